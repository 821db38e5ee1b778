"""Rows are handed out to one stream at a time, whatever the order of coming and going."""

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.slots import Slots

COUNT = 5


class Tenancy(RuleBasedStateMachine):
    """Streams come and go; who lives where is written down beside the slots."""

    tenants = Bundle("tenants")

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(COUNT)
        self.lived: dict[int, int] = dict.fromkeys(range(COUNT), 0)
        self.taken: set[int] = set()

    @rule(target=tenants, wanted=st.just(1))
    def come(self, wanted: int) -> int | None:
        if self.slots.full:
            assert len(self.taken) == COUNT
            return None
        slot = self.slots.acquire()
        assert slot not in self.taken, "two tenants in one row"
        assert 0 <= slot < COUNT
        self.taken.add(slot)
        self.lived[slot] += 1
        return slot

    @rule(slot=consumes(tenants))
    def go(self, slot: int | None) -> None:
        if slot is not None:
            self.slots.release(slot)
            self.taken.remove(slot)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.slots) == len(self.taken)
        assert self.slots.full == (len(self.taken) == COUNT)
        assert self.slots.generation.tolist() == list(self.lived.values())


TestTenancy = Tenancy.TestCase
