"""Giving the streams of one server to another, so that the first can stop without an outage.

State goes over the wire as checkpoints go to the disk. Nothing is let go of until all of it has
been taken; then clients are told where to go, and send there what was not acknowledged here.
"""

from engine import messages
from engine.client import Client
from engine.errors import Disconnected, Refused
from engine.keys import Identity
from engine.lives import Taken

_PART_BYTES = 256 * 1024
_PATIENCE_S = 20.0


def give(groups: list[Taken], to: str, identity: Identity | None) -> None:
    """Let another server go on with streams.

    Parameters
    ----------
    groups : list of Taken
    to : str
        Where that server takes clients.
    identity : Identity or None
        The key that is shown there; it needs the right to adopt.

    Raises
    ------
    Refused, Disconnected
        If it does not take them all; those that it had taken are ended there.
    """
    with Client(to, _PATIENCE_S, identity) as client:
        try:
            for number, group in enumerate(groups, 1):
                starts = range(0, len(group.state), _PART_BYTES)
                for start in starts:
                    part = group.state[start : start + _PART_BYTES]
                    more = start != starts[-1]
                    client.tell(messages.Adopt(group.name, part, more, number))
            client.wait_for_answers(len(groups))
        except (Refused, Disconnected):
            for name in (name for group in groups for name in group.streams):
                client.tell(messages.Close(name))
            raise
