"""The CUDA source of a group: as `source`, the same expressions in another loop."""

from __future__ import annotations

from collections.abc import Callable

from fullframe.codegen import expressions as table
from fullframe.codegen.cpp import read
from fullframe.codegen.group import Group, Operand

PRELUDE = read("cuda_prelude.h")
"""What all sources begin with, after their constants."""

COLUMN = 4
"""Elements of a column, where memory allows it."""

ENTRIES = ("fullframe_single", "fullframe_column", "fullframe_kept")
"""The functions of a source: void (Geometry, Places), for columns of one element; of `COLUMN` elements; and, of
a group with reductions, of `COLUMN` elements that are kept."""

JOIN = "fullframe_join"
"""The function that joins the chunks of reductions: void (Geometry, Places)."""


def kept_axes(group: Group) -> list[int]:
    """The loop axes that the reductions keep; all where there are none."""
    reduced = group.reductions[0].axes if group.reductions else ()
    return [axis for axis in range(group.rank) if axis not in reduced]


def generate(group: Group, *, wide: bool = False, threads: int = 256) -> str:
    """The source of a kernel that runs `group`, whose reductions are over the same axes.

    `wide`: count with 64 bits; `threads` of a block, a power of two.
    """
    kept = len(kept_axes(group))
    constants = {
        "THREADS": threads,
        "TENSORS": len(group.operands) + len(group.outputs),
        "KEPT": max(kept, 1),
        "REDUCED": max(group.rank - kept, 1),
        "SLOTS": sum(slots(group)),
    }
    lines = [
        f"#define WIDE {int(wide)}",
        f"#define INDEX {'unsigned long long' if wide else 'unsigned int'}",
        *(f"constexpr int {name} = {value};" for name, value in constants.items()),
        PRELUDE,
        *(_reducing(group) if group.reductions else _mapping(group)),
        "",
    ]
    kinds = ("<1, 1>", f"<{COLUMN}, 1>", f"<{COLUMN}, {COLUMN}>") if group.reductions else ("<1>", f"<{COLUMN}>")
    for entry, kind in zip(ENTRIES, kinds, strict=False):
        lines += _entry(entry, f"run{kind}(g, p);")
    return "\n".join([*lines, *(_joining(group) if group.reductions else [])])


def slots(group: Group) -> list[int]:
    """Numbers that each reduction has per element kept."""
    return [1 if reduction.kind == "sum" else 3 for reduction in group.reductions]


def _entry(name: str, *body: str) -> list[str]:
    arguments = "const __grid_constant__ Geometry g, const __grid_constant__ Places p"
    head = f'extern "C" __global__ void __launch_bounds__(THREADS) {name}({arguments}) {{'
    return [head, *("    " + line for line in body), "}"]


# ---- one element --------------------------------------------------------------------------------------------


def _single(operand: Operand) -> bool:
    """Whether it is one number."""
    return all(operand.broadcast)


def _settled(group: Group, operand: Operand) -> bool:
    """Whether it does not vary along the axes that are reduced, so that it is read once per k."""
    kept = kept_axes(group)
    return bool(group.reductions) and all(b or axis in kept for axis, b in enumerate(operand.broadcast))


def _constants(group: Group) -> list[str]:
    """Reading what is one number."""
    lines = []
    for i, operand in enumerate(group.operands):
        form = table.FORMATS[operand.dtype]
        if _single(operand):
            lines.append(f"const {form.stored} x{i} = constant<{form.stored}>(p.at[{i}], g.lane[{i}]);")
    return lines


def _reads(group: Group, chosen: Callable[[Operand], bool], at: str, number: str = "") -> list[str]:
    """Reading a column of some operands that are not single numbers, at the offsets `at`."""
    lines = []
    for i, operand in enumerate(group.operands):
        if not _single(operand) and chosen(operand):
            stored = table.FORMATS[operand.dtype].stored
            lines.append(f"x{i}{number} = fetch<{stored}, V>(p.at[{i}], {at}[{i}], g.lane[{i}]);")
    return lines


def _column(group: Group) -> list[str]:
    """The nodes, outputs and sums of the V elements of step `u`, whose operands have been read."""
    names = [f"v{i}" for i in range(len(group.operands) + len(group.nodes))]
    begins, lines, ends = [], [], []
    for i, operand in enumerate(group.operands):
        form = table.FORMATS[operand.dtype]
        element = f"x{i}" if _single(operand) else f"x{i}{'' if _settled(group, operand) else '[u]'}.lane[j]"
        lines.append(f"const {form.held} v{i} = {form.load(element)};")
    lines += table.definitions(group, names)
    for i, ref in enumerate(group.outputs):
        form, t = table.FORMATS[group.dtype(ref)], len(group.operands) + i
        begins.append(f"Lanes<{form.stored}, V> y{i};")
        lines.append(f"y{i}.lane[j] = {form.store(names[ref.index])};")
        ends.append(f"put(p.at[{t}], at[u][{t}], y{i});")
    if group.reductions:
        lines.append("const int q = LANES == 1 ? 0 : j;")
        ends.append("seen += V / LANES;")
    if any(reduction.kind == "moments" for reduction in group.reductions):
        lines.append("const bool first = seen == 0 && (LANES > 1 || j == 0);")
    for i, reduction in enumerate(group.reductions):
        value = f"(double){names[reduction.value.index]}"
        if reduction.kind == "sum":
            lines.append(f"a{i}[q] += {value};")
        else:
            lines.append(f"if (first) c{i}[q] = unless_infinite({value});")
            lines.append(f"const double d{i} = {value} - c{i}[q];")
            lines.append(f"a{i}[q] += d{i}, b{i}[q] = m_fma(d{i}, d{i}, b{i}[q]);")
    return [*begins, "#pragma unroll", "for (int j = 0; j < V; j++) {", *_indented(lines), "}", *ends]


def _steps(group: Group, count: str, base: str, which: str) -> list[str]:
    """Some steps at once: first all is read, then computed, as an output may be the memory of an operand."""
    columns = []
    for i, operand in enumerate(group.operands):
        if not _single(operand) and not _settled(group, operand):
            columns.append(f"Lanes<{table.FORMATS[operand.dtype].stored}, V> x{i}[UNROLL];")
    start = f"at[u][t] = {base}[t];" if base else "at[u][t] = 0;"
    return [
        "INDEX at[UNROLL][TENSORS + 1];",
        *columns,
        "#pragma unroll",
        "for (int u = 0; u < UNROLL; u++) {",
        "#pragma unroll",
        f"    for (int t = 0; t <= TENSORS; t++) {start}",
        # Beyond the end the last one is read again, and not used.
        f"    locate<{which.upper()}>(least(n + u * stride, {count} - 1), g.{which}, g.{which}_axes, at[u]);",
        *_indented(_reads(group, lambda operand: not _settled(group, operand), "at[u]", "[u]")),
        "}",
        "#pragma unroll",
        "for (int u = 0; u < UNROLL; u++) {",
        f"    if (n + u * stride >= {count}) break;",
        *_indented(_column(group)),
        "}",
    ]


def _indented(lines: list[str]) -> list[str]:
    return [line if line.startswith("#") else "    " + line for line in lines]


# ---- loops --------------------------------------------------------------------------------------------------


def _mapping(group: Group) -> list[str]:
    """The loop of a group without reductions."""
    body = [
        "constexpr int UNROLL = V == 1 ? 4 : 2;",
        *_constants(group),
        "const INDEX stride = (INDEX)gridDim.x * THREADS;",
        "for (INDEX n = (INDEX)blockIdx.x * THREADS + threadIdx.x; n < g.kept_columns; n += UNROLL * stride) {",
        *_indented(_steps(group, "g.kept_columns", "", "kept")),
        "}",
    ]
    head = "template <int V> INLINE void run(const Geometry &g, const Places &p) {"
    return [head, *_indented(body), "}"]


def _reducing(group: Group) -> list[str]:
    """The loop of a group with reductions: over the k of a block, and for each over the r of a chunk."""
    settled, begins, ends = [], [], []
    for i, operand in enumerate(group.operands):
        if not _single(operand) and _settled(group, operand):
            settled.append(f"Lanes<{table.FORMATS[operand.dtype].stored}, V> x{i};")
    for i, reduction in enumerate(group.reductions):
        names = [f"a{i}"] if reduction.kind == "sum" else [f"a{i}", f"b{i}", f"c{i}"]
        begins.append(f"double {', '.join(f'{name}[LANES] = {{0}}' for name in names)};")
    for i, reduction in enumerate(group.reductions):
        if reduction.kind == "moments":
            ends += [
                f"Moments m{i}[LANES];",
                "#pragma unroll",
                f"for (int q = 0; q < LANES; q++) m{i}[q] = moments((double)seen, c{i}[q], a{i}[q], b{i}[q]);",
            ]
        ends.append(f"join<LANES>(team, shared, {_partial(group, i)});")
    puts = [
        f"out.put({slot}, {_partial(group, i)}[q]);"
        for i, slot in enumerate(_offsets(group))
    ]  # fmt: skip
    body = [
        "constexpr int UNROLL = V == 1 ? 4 : 2;",
        f"__shared__ double shared[{max(slots(group))} * LANES * THREADS];",
        "const Team team(g.across, g.inner);",
        *_constants(group),
        "const INDEX stride = (INDEX)gridDim.x * team.rows, groups = ((g.kept_columns - 1) >> g.across) + 1;",
        "for (INDEX part = blockIdx.y; part < groups; part += gridDim.y) {",
        "    const INDEX own = (part << g.across) + team.column(g.across, g.inner);",
        "    const INDEX k = least(own, g.kept_columns - 1);",
        "    INDEX base[TENSORS + 1] = {0}, seen = 0;",
        "    locate<KEPT>(k, g.kept, g.kept_axes, base);",
        *_indented(settled),
        *_indented(_reads(group, lambda operand: _settled(group, operand), "base")),
        *_indented(begins),
        "    INDEX n = own == k ? blockIdx.x * team.rows + team.row : g.reduced_columns;",
        "    for (; n < g.reduced_columns; n += UNROLL * stride) {",
        *_indented(_indented(_steps(group, "g.reduced_columns", "base", "reduced"))),
        "    }",
        *_indented(ends),
        "    if (team.row || own != k) continue;",
        "#pragma unroll",
        "    for (int q = 0; q < LANES; q++) {",
        "        const uint64_t place = base[TENSORS] + (uint64_t)q * g.lane[TENSORS];",
        "        const Slots out(g, p, (uint64_t)k * LANES + q, place, g.chunks == 1);",
        *_indented(_indented(puts)),
        "    }",
        "}",
    ]
    head = "template <int V, int LANES> INLINE void run(const Geometry &g, const Places &p) {"
    return [head, *_indented(body), "}"]


def _partial(group: Group, i: int) -> str:
    """The array of a reduction's partial results, per element kept."""
    return f"a{i}" if group.reductions[i].kind == "sum" else f"m{i}"


def _offsets(group: Group) -> list[int]:
    """Per reduction, its first slot."""
    counts = slots(group)
    return [sum(counts[:i]) for i in range(len(counts))]


def _joining(group: Group) -> list[str]:
    """The function that joins chunks: neighbouring threads take neighbouring elements."""
    begins, ends, puts, takes = [], [], [], []
    for i, slot in enumerate(_offsets(group)):
        name, kind = _partial(group, i), "double" if group.reductions[i].kind == "sum" else "Moments"
        begins.append(f"{kind} {name}[1] = {{}};")
        takes.append(f"take(from + {slot} * elements, elements, {name}[0]);")
        ends.append(f"join<1>(team, shared, {name});")
        puts.append(f"out.put({slot}, {name}[0]);")
    return _entry(
        JOIN,
        f"__shared__ double shared[{max(slots(group))} * THREADS];",
        "const Team team(g.joining, true);",
        "const uint64_t elements = (uint64_t)g.kept_columns * g.lanes;",
        "for (uint64_t part = blockIdx.x; part << g.joining < elements; part += gridDim.x) {",
        "    const uint64_t e = (part << g.joining) + team.column(g.joining, true);",
        *_indented(begins),
        "    for (INDEX c = e < elements ? team.row : g.chunks; c < g.chunks; c += team.rows) {",
        "        const double *from = p.work + c * (SLOTS * elements) + e;",
        *_indented(_indented(takes)),
        "    }",
        *_indented(ends),
        "    if (team.row || e >= elements) continue;",
        "    INDEX at[TENSORS + 1] = {0};",
        "    locate<KEPT>((INDEX)(e / g.lanes), g.kept, g.kept_axes, at);",
        "    const uint64_t place = at[TENSORS] + (e % g.lanes) * g.lane[TENSORS];",
        "    const Slots out(g, p, e, place, true);",
        *_indented(puts),
        "}",
    )
