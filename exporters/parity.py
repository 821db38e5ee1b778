"""What an exported graph must pass before it is written: it computes what torch does.

Every check runs on random states that are all distinct, because equal ones (zeros, above all)
hide a graph in which ``h`` and ``c`` were wired to one input.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.errors import MurmurError
from engine.model_file import ModelSpec, open_session

Array = NDArray[Any]
Arrays = dict[str, Array]

# Torch and ONNX Runtime sum in another order; measured 1e-7 to 1e-6 for what this exports.
TOLERANCE = 1e-5
_HOPS = 8  # of the recording that is cut into chunks
_BATCHES = (2, 3, 16, 32)
_ROWS = 96  # that are run in such batches: what rounds otherwise may show in one row of ten only


class ExportError(MurmurError):
    """A network is not exportable, or its graph does not compute what the network does."""


def check(
    net: nn.Module,
    spec: ModelSpec,
    graph: bytes,
    tolerance: float = TOLERANCE,
    hop_by_hop: bool = False,
) -> None:
    """Compare a graph with its network.

    Parameters
    ----------
    net : nn.Module
        In eval mode, with ``forward(x, *states) -> (*outputs, *new_states)``.
    spec : ModelSpec
        Of one stage.
    graph : bytes
        A serialised ONNX model.
    tolerance : float
        Greatest difference of a value of at most 1.
    hop_by_hop : bool
        The graph takes one hop a call.

    Raises
    ------
    ExportError
        At the first fault; the message names the check and the tensor.
    """
    checks = _Checks(net, spec, graph, tolerance)
    checks.names()
    checks.every_input_counts()
    checks.torch_is_onnx(1 if hop_by_hop else 3)
    checks.states_keep_their_places()
    checks.whole_is_chunks()
    checks.alone_is_batched()


class _Checks:
    """The checks, one method each; all draw from one seeded generator."""

    def __init__(self, net: nn.Module, spec: ModelSpec, graph: bytes, tolerance: float) -> None:
        self.net = net
        self.tolerance = tolerance
        self.spec = spec
        self.stage = spec.stages[0]
        self.session = open_session(graph)
        self.rng = np.random.default_rng(0)
        self.inputs = [self.stage.input, *(s.input for s in self.stage.states)]
        self.outputs = [*(o.name for o in spec.outputs), *(s.output for s in self.stage.states)]

    def names(self) -> None:
        """Check that the graph has the statement's inputs and outputs, and no others."""
        for kind, stated, nodes in (
            ("inputs", self.inputs, self.session.get_inputs()),
            ("outputs", self.outputs, self.session.get_outputs()),
        ):
            found = [node.name for node in nodes]
            if found != stated:
                raise ExportError(f"{kind}: the statement names {stated}, the graph has {found}")

    def every_input_counts(self) -> None:
        """Check that a change of any input changes some output."""
        feed = self._random(rows=3)
        reference = self._run(feed)
        for name in self.inputs:
            changed = self._run(feed | {name: feed[name] + 0.5})
            if all(np.array_equal(changed[key], reference[key]) for key in self.outputs):
                raise ExportError(f"every input counts: {name} changes no output")

    def torch_is_onnx(self, most: int) -> None:
        """Check that both compute the same, for several batches and lengths."""
        for rows, hops in ((1, 1), (2, 1), (5, 3), (33, 2)):
            feed = self._random(rows, min(hops, most))
            self._compare("torch is ONNX", self._torch(feed), self._run(feed))

    def states_keep_their_places(self) -> None:
        """Check that exchanging two states does in the graph what it does in torch."""
        feed = self._random(rows=3)
        reference = self._run(feed)
        for first, second in self._alike():
            swapped = feed | {first: feed[second], second: feed[first]}
            found = self._run(swapped)
            if all(np.array_equal(found[key], reference[key]) for key in self.outputs):
                raise ExportError(f"states keep their places: {first} and {second} are one input")
            self._compare("states keep their places", self._torch(swapped), found)

    def whole_is_chunks(self) -> None:
        """Check torch on a whole recording against ONNX hop by hop with the state carried."""
        feed = self._random(rows=3, hops=_HOPS)
        whole = self._torch(feed)
        cut = np.split(feed[self.stage.input], _HOPS, axis=1)
        states = {s.input: feed[s.input] for s in self.stage.states}
        steps = []
        for chunk in cut:
            steps.append(self._run({self.stage.input: chunk} | states))
            states = {s.input: steps[-1][s.output] for s in self.stage.states}
        joined = {
            o.name: np.concatenate([step[o.name] for step in steps], axis=1)
            for o in self.spec.outputs
        }
        joined |= {s.output: states[s.input] for s in self.stage.states}
        self._compare("whole is chunks", whole, joined)

    def alone_is_batched(self) -> None:
        """Check that a row does not depend on its neighbours, however loud they are.

        Bit for bit from two rows on; a single row within the tolerance, because ONNX Runtime
        has another kernel for it (vanilla RNN), which the engine avoids by padding to two.
        """
        feed = self._random(rows=_ROWS)
        feed[self.stage.input][::3] *= 30.0
        two, *more = (self._in_batches(feed, rows) for rows in _BATCHES)
        self._compare("alone is batched", self._in_batches(feed, 1), two)
        for found in more:
            self._compare("alone is batched", two, found, tolerance=0.0)

    def _in_batches(self, feed: Arrays, rows: int) -> Arrays:
        parts = [
            self._run({name: value[start : start + rows] for name, value in feed.items()})
            for start in range(0, _ROWS, rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _alike(self) -> list[tuple[str, str]]:
        states = self.stage.states
        return [
            (first.input, second.input)
            for index, first in enumerate(states)
            for second in states[index + 1 :]
            if first.shape == second.shape
        ]

    def _random(self, rows: int, hops: int = 1) -> Arrays:
        time, *rest = self.stage.input_shape
        shapes = {self.stage.input: (time * hops, *rest)}
        shapes |= {state.input: state.shape for state in self.stage.states}
        # Within what gates leave in a state, so that no tanh is saturated and hides a fault.
        return {
            name: self.rng.uniform(-0.9, 0.9, (rows, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    def _run(self, feed: Arrays) -> Arrays:
        results: Sequence[Array] = self.session.run(self.outputs, feed)
        return dict(zip(self.outputs, results, strict=True))

    def _torch(self, feed: Arrays) -> Arrays:
        with torch.no_grad():
            results = self.net(*(torch.from_numpy(feed[name]) for name in self.inputs))
        return {name: r.numpy() for name, r in zip(self.outputs, results, strict=True)}

    def _compare(
        self, check: str, expected: Arrays, found: Arrays, tolerance: float | None = None
    ) -> None:
        tolerance = self.tolerance if tolerance is None else tolerance
        for name in self.outputs:
            if expected[name].shape != found[name].shape:
                raise ExportError(
                    f"{check}: {name}: expected shape {expected[name].shape}, "
                    f"found {found[name].shape}"
                )
            worst = float(np.abs(expected[name] - found[name]).max())
            # An LSTM's c is not bounded by 1; above that the tolerance is of its size.
            allowed = tolerance * max(1.0, float(np.abs(expected[name]).max()))
            if not worst <= allowed:  # not ">", which a NaN would pass
                raise ExportError(f"{check}: {name} differs by {worst:.2g}, allowed: {allowed:.2g}")
