"""The C++ source of a group: a pure function of the group, without its name, so that equal forms share it."""

from __future__ import annotations

from pathlib import Path

import torch

from fullframe.codegen import expressions as table
from fullframe.codegen.group import Group, Operand, Reduction


def read(name: str) -> str:
    """A header of the folder beside this file, with the functions that expressions call where it includes them."""
    folder = Path(__file__).parent / "headers"
    return (folder / name).read_text().replace('#include "functions.h"\n', (folder / "functions.h").read_text())


PRELUDE = read("prelude.h")
"""What all sources begin with."""

ENTRY = "fullframe_kernel"
"""The function of a source: int (const int64_t *geometry, void *const *tensors, double *partials)."""


def generate(group: Group) -> str:
    """The source of a kernel that runs `group`; every call in it must be supported."""
    width = f"constexpr long VECTOR = {_vector(group)};  // lanes of a column"
    return "\n".join([width, PRELUDE, *_body(group), "", *_entry(group), ""])


def _varying(operand: Operand) -> int:
    """Along how many axes of the loop an operand varies."""
    return len(operand.broadcast) - sum(operand.broadcast)


def is_vector(operand: Operand) -> bool:
    """Whether it is taken for a vector per channel: the same in all steps of a block, so kept in registers."""
    return _varying(operand) == 1 < len(operand.broadcast)


def accumulator(dtype: torch.dtype) -> str:
    """The type in which a few values of `dtype` are added; their sum is exact where they are small integers."""
    return "double" if dtype in (torch.float64, torch.int64, torch.int32) else "float"


def _vector(group: Group) -> int:
    """Lanes of a column: whole registers of 64 bytes for each type in memory."""
    dtypes = [o.dtype for o in group.operands if _varying(o)] + [group.dtype(ref) for ref in group.outputs]
    return 64 if any(dtype.itemsize == 1 for dtype in dtypes) else 32


def _body(group: Group) -> list[str]:
    """The function that runs a block: a few steps at a time, and of these one column of lanes after another."""
    parameters, loads, stores = ["const Form &form", "int64_t steps", "int64_t valid"], [], []
    names = [f"v{i}" for i in range(len(group.operands) + len(group.nodes))]
    for i, operand in enumerate(group.operands):
        form = table.FORMATS[operand.dtype]
        if not _varying(operand):
            parameters.append(f"{form.held} v{i}")
            continue
        fixed = is_vector(operand)  # then `restrict` lets it stay in registers
        parameters.append(f"const {form.stored} *{'__restrict ' * fixed}x{i}, int64_t t{i}")
        place = "g + j" if fixed else f"k * t{i} + g + j"
        loads.append(f"const {form.held} v{i} = {form.load(f'x{i}[{place}]')};")
    loads += table.definitions(group, names)
    for i, ref in enumerate(group.outputs):
        form = table.FORMATS[group.dtype(ref)]
        parameters.append(f"{form.stored} *y{i}, int64_t u{i}")
        stores.append(f"y{i}[k * u{i} + g + j] = {form.store(names[ref.index])};")
    begins, run, ends = [], [], []
    for i, reduction in enumerate(group.reductions):
        held, value = accumulator(group.dtype(reduction.value)), names[reduction.value.index]
        parameters.append(f"{_accumulator_type(group, reduction)} &r{i}")
        begins.append(f"{held} *__restrict s{i} = r{i}.sum, *__restrict q{i} = r{i}.square;")
        run.append(f"{held} a{i}[VECTOR] = {{0}}, b{i}[VECTOR] = {{0}};")
        if reduction.kind == "sum":
            stores.append(f"a{i}[j] += ({held}){value};")
        else:
            begins.append(f"const {held} *__restrict c{i} = r{i}.shift;")
            stores.append(f"const {held} d{i} = ({held}){value} - c{i}[g + j];")
            stores.append(f"a{i}[j] += d{i}, b{i}[j] = m_fma(d{i}, d{i}, b{i}[j]);")
            ends.append(f"for (int64_t j = 0; j < VECTOR; j++) q{i}[g + j] += b{i}[j];")
        ends.append(f"for (int64_t j = 0; j < VECTOR; j++) s{i}[g + j] += a{i}[j];")
    # An output may be the array of an operand: no lane reads what another one writes, which is what
    # `INDEPENDENT` says and `restrict` would deny.
    return [
        f"static APART void body({', '.join(parameters)}) {{",
        *("    " + line for line in begins),
        "    for (int64_t begin = 0; begin < steps; begin += form.run) {",
        "        const int64_t end = least(begin + form.run, steps);",
        "        for (int64_t g = 0; g < form.lanes; g += VECTOR) {",
        *("            " + line for line in run),
        "            for (int64_t k = begin; k < end; k++) {",
        "INDEPENDENT",
        "                for (int64_t j = 0; j < VECTOR; j++) {",
        *("                    " + line for line in (*loads, *stores)),
        "                }",
        "            }",
        *("            " + line for line in ends),
        "        }",
        *(f"        r{i}.pause(form, valid, end == steps);" for i in range(len(group.reductions))),
        "    }",
        *(f"    r{i}.add(steps, valid);" for i in range(len(group.reductions))),
        "}",
    ]


def _accumulator_type(group: Group, reduction: Reduction) -> str:
    kind = "Sum" if reduction.kind == "sum" else "Moments"
    return f"{kind}<{accumulator(group.dtype(reduction.value))}>"


def _entry(group: Group) -> list[str]:
    """The walk over the blocks.

    Geometry: rank, extents, strides per tensor, and per reduction strides, plane and offset in the partials.
    """
    tensors, sums = len(group.operands) + len(group.outputs), len(group.reductions)
    vectors = [i for i, operand in enumerate(group.operands) if is_vector(operand)]
    alone = [f"kept[{r} * (rank + 2) + outer] != 0" for r in range(sums)]
    moving = [f"strides[{i} * rank + outer] != 0" for i in vectors]
    lines = [
        f'extern "C" int {ENTRY}(const int64_t *geometry, void *const *tensors, double *partials) {{',
        "    const int64_t rank = geometry[0], *extent = geometry + 1, outer = rank - 2;",
        f"    const int64_t *strides = extent + rank, *kept = strides + {tensors} * rank;",
        f"    const Form form(extent[rank - 1], {' || '.join(alone) or 'false'}, {' || '.join(moving) or 'false'});",
        f"    Arena arena({tensors + 5 * sums}, form.lanes > BUFFERED ? form.lanes : BUFFERED);",
        "    if (!arena.memory) return 1;",
    ]
    for i, operand in enumerate(group.operands):
        form = table.FORMATS[operand.dtype]
        if _varying(operand):
            lines.append(f"    Input<{form.stored}> x{i}(arena, form, strides + {i} * rank + outer);")
        else:
            lines.append(f"    const {form.held} v{i} = {form.load(f'*(const {form.stored} *)tensors[{i}]')};")
    for i, ref in enumerate(group.outputs):
        place = f"strides + {len(group.operands) + i} * rank + outer"
        lines.append(f"    Output<{table.FORMATS[group.dtype(ref)].stored}> y{i}(arena, form, {place});")
    for i, reduction in enumerate(group.reductions):
        kind = _accumulator_type(group, reduction)
        base = f"kept[{i} * (rank + 2) + outer + "
        lines.append(f"    {kind} r{i}(arena, form, {base}1] ? form.channels : 1, {base}1], {base}2]);")
    arrays = [f"x{i}" for i, o in enumerate(group.operands) if _varying(o) and not is_vector(o)]
    direct = [f"{name}.direct" for name in (*arrays, *(f"y{i}" for i in range(len(group.outputs))))]
    return [
        *lines,
        f"    const int64_t room = ({' && '.join(direct) or 'true'} ? DIRECT : BUFFERED) / form.lanes;",
        "    const int64_t most = form.single || room < 1 ? 1 : room;",
        "    int64_t index[MAX_RANK] = {0};",
        "    for (bool more = true; more;) {",
        f"        int64_t at[{tensors + sums} + 1] = {{0}};",
        f"        for (int64_t r = 0; r < {sums}; r++) at[{tensors} + r] = kept[r * (rank + 2) + rank + 1];",
        "        for (int64_t axis = 0; axis < outer; axis++) {",
        f"            for (int64_t t = 0; t < {tensors}; t++) at[t] += index[axis] * strides[t * rank + axis];",
        f"            for (int64_t r = 0; r < {sums}; r++)",
        f"                at[{tensors} + r] += index[axis] * kept[r * (rank + 2) + axis];",
        "        }",
        "        for (int64_t p = 0, left = extent[outer]; left > 0;) {",
        *("            " + line for line in _block(group)),
        "            p += block.pixels, left -= block.pixels;",
        "        }",
        "        int64_t axis = outer - 1;",
        "        while (axis >= 0 && ++index[axis] == extent[axis]) index[axis--] = 0;",
        "        more = axis >= 0;",
        "    }",
        *(f"    r{i}.turn(nullptr);" for i in range(sums)),
        "    return 0;",
        "}",
    ]


def _block(group: Group) -> list[str]:
    """One block: choose it, find the lanes, run the body, put back what was buffered."""
    tensors, sums = len(group.operands) + len(group.outputs), len(group.reductions)
    lines, arguments = [], ["form", "block.steps", "valid"]
    for i in range(sums):
        place = f"partials + at[{tensors + i}] + p * kept[{i} * (rank + 2) + outer]"
        lines.append(f"const int64_t room{i} = r{i}.open({place});")
    lines.append("int64_t steps = least(most, left / form.pixels);")
    lines += [f"steps = least(steps, room{i});" for i in range(sums)]
    lines += [
        "const Block block{steps ? steps : 1, steps ? steps * form.pixels : left, steps && form.full()};",
        "const Block one{1, least(block.pixels, form.pixels), block.whole};",
        "const int64_t valid = steps ? form.pixels * form.channels : left * form.channels;",
    ]
    for i, operand in enumerate(group.operands):
        stored = table.FORMATS[operand.dtype].stored
        if _varying(operand):
            lines.append(f"const {stored} *l{i} = (const {stored} *)tensors[{i}] + at[{i}] + p * x{i}.across;")
            lines.append(f"l{i} = x{i}.lanes(l{i}, form, {'one' if is_vector(operand) else 'block'});")
        arguments.append(f"l{i}, x{i}.step" if _varying(operand) else f"v{i}")
    for i, ref in enumerate(group.outputs):
        t = len(group.operands) + i
        stored = table.FORMATS[group.dtype(ref)].stored
        lines.append(f"{stored} *w{i} = ({stored} *)tensors[{t}] + at[{t}] + p * y{i}.across;")
        lines.append(f"{stored} *m{i} = y{i}.lanes(w{i}, form, block);")
        arguments.append(f"m{i}, y{i}.step")
    arguments += [f"r{i}" for i in range(sums)]
    lines.append(f"body({', '.join(arguments)});")
    lines += [f"y{i}.commit(w{i}, form, block);" for i in range(len(group.outputs))]
    return lines
