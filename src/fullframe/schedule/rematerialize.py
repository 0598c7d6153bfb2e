"""From a state of storing to sections: what each stage loads, makes again on the way, and stores.

A value that is stored in several gaps is another *version* in each, with a place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fullframe.ir.graph import Graph, Op, Value
from fullframe.partition.sections import Section
from fullframe.partition.tile_axes import tiled
from fullframe.schedule.clones import Draft
from fullframe.schedule.cost import Nodes, Stage, bits_of, merged, more_to_store, nodes_of, stages_of
from fullframe.schedule.memory import rounded
from fullframe.schedule.search import Search

SMALL = 1 << 16  # bytes of an untiled value that are not worth counting


class Stages:
    """The stages of a draft in which everything is stored, and the drafts of other states."""

    def __init__(self, graph: Graph, draft: Draft, window: int, *, join: bool):
        self.graph, self.base = graph, draft
        self.saved = replace(draft.saved, tile_axes=dict(draft.saved.tile_axes), maker=dict(draft.saved.maker))
        outputs = set(graph.outputs)

        def size(value: Value) -> int:
            if value in outputs:
                return 0
            return rounded(value.nbytes) if tiled(value, self.saved.tile_axes) else value.nbytes

        more = more_to_store(graph, draft.saved)
        # Which stages may be joined depends on all that they wait for.
        self.plain = [not join and _plain(section, draft) for section in draft.stages]
        self.left_out = {
            v for section, plain in zip(draft.stages, self.plain, strict=True) if plain for v in section.outputs
        }
        self.nodes: Nodes = nodes_of(graph, draft.saved, more, self.left_out, size)
        searched = [section for section, plain in zip(draft.stages, self.plain, strict=True) if not plain]
        self.stages: list[Stage] = stages_of(searched, draft.saved, self.nodes)
        if join:
            self.stages = merged(self.stages, self.nodes, draft.early)
        extents: dict[int, int] = {}
        for value in self.nodes.values:
            for axis, n in zip(self.saved.tile_axes[value], value.shape, strict=True):
                if axis is not None:
                    extents[axis] = max(extents.get(axis, 1), n)
        self.search = Search(self.nodes, self.stages, window, extents)
        self.search.store_everything()
        self.index = {v: k for k, v in enumerate(self.nodes.values)}
        self.order = dict(draft.order)
        self.sizes = dict(draft.sizes)
        self.clones: dict[tuple[int, int], Value] = {}
        self.sections: dict[tuple[object, ...], Section] = {}
        self.ops: dict[tuple[object, ...], Op] = {}

    def draft(self, state: Search) -> Draft:
        """The sections of a state."""
        latest: dict[int, Value] = {}
        stages: list[Section] = []
        early, once, t = 0, 0, 0
        for position, (section, plain) in enumerate(zip(self.base.stages, self.plain, strict=True)):
            if position == self.base.early:
                early = len(stages)
            if plain:
                stages.append(section)
                continue
            starts = state.enter[t + 1] & ~state.enter[t]
            if self.stages[t].wanted or starts:
                stages.append(self._section(state, t, starts, latest, once))
                once |= state.done[t].made
            t += 1
        early = len(stages) if self.base.early >= len(self.base.stages) else early
        return Draft(self.saved, stages, early, self.order, self.base.kept, self.sizes)

    def _section(self, state: Search, t: int, starts: int, latest: dict[int, Value], once: int) -> Section:
        nodes, stage = self.nodes, self.stages[t]
        wanted = sorted({*stage.wanted, *bits_of(starts)})
        under = 0
        for k in wanted:
            under |= state.origins[k]
        stop = {nodes.values[k] for k in bits_of(state.found(t) & under)} | self.left_out
        ops: set[Op] = set()
        loads: set[Value] = set()
        targets = [nodes.values[k] for k in wanted]
        for target in targets:
            some, reads = self.saved.slice_of(target, stop)
            ops |= some
            loads |= reads
        names = {v: latest[self.index[v]] for v in loads if v in self.index and self.index[v] in latest}
        for k in bits_of(starts):
            names[nodes.values[k]] = latest[k] = self._version(k, t)
        made = {op.output for op in ops}
        loads -= made
        recompute = sum(nodes.heavy[k] > 0 for k in bits_of(state.done[t].made & once))
        ordered = sorted(ops, key=self.order.__getitem__)
        key = (tuple(targets), frozenset(ops), tuple(sorted((k.name, v.name) for k, v in names.items())), recompute)
        if key not in self.sections:
            self.sections[key] = self._renamed(
                ordered, sorted(loads, key=lambda v: v.name), targets, names, recompute
            )
        return self.sections[key]

    def _renamed(self, ops: Sequence[Op], loads: Sequence[Value], targets: Sequence[Value],
                 names: dict[Value, Value], recompute: int) -> Section:  # fmt: skip
        new: dict[Op, Op] = {}
        for op in ops:
            inputs = tuple(names.get(v, v) for v in op.inputs)
            output = names.get(op.output, op.output)
            if inputs == op.inputs and output is op.output:
                new[op] = op
                continue
            key = (op, inputs, output)
            if key not in self.ops:
                self.ops[key] = replace(op, inputs=inputs, output=output)
                self.order[self.ops[key]] = self.order[op]
            new[op] = self.ops[key]
        summing = [self.saved.maker[v] in self.saved.reducing for v in targets]
        sums = tuple(new[self.saved.maker[v]] for v, yes in zip(targets, summing, strict=True) if yes)
        saves = tuple(names.get(v, v) for v, yes in zip(targets, summing, strict=True) if not yes)
        found = tuple(names.get(v, v) for v in loads)
        return Section(tuple(new[op] for op in ops), found, saves, sums, recompute=recompute)

    def _version(self, k: int, t: int) -> Value:
        """The value as it is stored from a stage on: itself where it was first planned to be made."""
        value = self.nodes.values[k]
        if self.search.home[k] == t:
            return value
        if (k, t) not in self.clones:
            clone = Value(f"{value.name}'{t}", value.shape, value.dtype, value.itemsize)
            self.saved.tile_axes[clone] = self.saved.tile_axes[value]
            self.sizes[clone] = self.nodes.size[k]
            self.clones[k, t] = clone
        return self.clones[k, t]


def _plain(section: Section, draft: Draft) -> bool:
    """Whether a section reads no map, makes none, and nothing large: it stays as it is, whatever is stored."""
    tile_axes = draft.saved.tile_axes
    return not any(tiled(v, tile_axes) or v.nbytes > SMALL for v in (*section.loads, *section.outputs))
