"""Programs of any size whose parts repeat, each with what once made an inspection grow with the square of the text."""

from tests.builders.hlo import ADD

_X = "f32[1024]{0}"
_EVERYONE = "replica_groups=[1,8]<=[8], use_global_device_ids=true"


def _program(entry: list[str], *computations: str, header: str = "") -> str:
    lines = "\n".join(f"  {line}" for line in entry)
    others = "\n".join(computations)
    head = f"HloModule grown, is_scheduled=true, num_partitions=8{header}"
    return f"{head}\n\n{ADD}\n{others}\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


def _chain(n: int, line: str, *first: str) -> list[str]:
    """`line` n times, in which OLD and NEW stand for an array before and after, and N for a number."""
    lines = [
        line.replace("OLD", f"%x.{k}").replace("NEW", f"%x.{k + 1}").replace("NUMBER", str(k + 1)) for k in range(n)
    ]
    return [f"%x.0 = {_X} parameter(0)", *first, *lines, "ROOT %end = () tuple()"]


def _tuple(n: int) -> str:
    return f"({', '.join([_X] * n)})"


def _names(stem: str, n: int) -> str:
    return ", ".join(f"{stem}.{k}" for k in range(n))


def elementwise(n: int) -> str:
    """Operations each of which may write over the one before."""
    return _program(_chain(n, f"NEW = {_X} tanh(OLD)"))


def kernels(n: int) -> str:
    """Kernels that the text does not describe, all alive at the end."""
    line = f'NEW = {_X} custom-call(OLD), custom_call_target="f"'
    return _program([*_chain(n, line)[:-1], f'ROOT %y = f32[] custom-call({_names("%x", n)}), custom_call_target="g"'])


def updates(n: int) -> str:
    """Updates of one array in place."""
    first = "%i = s32[] constant(0)", "%u = f32[1]{0} parameter(1)", f"%a = {_X} copy(%x.0)"
    return _program(_chain(n, f"NEW = {_X} dynamic-update-slice(OLD, %u, %i)", *first))


def fused_updates(n: int) -> str:
    """A fusion that updates many arrays in place at once."""
    fused = [f"%p.{k} = {_X} parameter({k})" for k in range(n)]
    fused += ["%z = s32[] constant(0)", "%s = f32[1]{0} constant({1})"]
    fused += [f"%u.{k} = {_X} dynamic-update-slice(%p.{k}, %s, %z)" for k in range(n)]
    fused += [f"ROOT %t = {_tuple(n)} tuple({_names('%u', n)})"]
    body = "%fused () -> f32[] {\n" + "\n".join(f"  {line}" for line in fused) + "\n}\n"
    arrays = [f"%a.{k} = {_X} copy(%x)" for k in range(n)]
    call = f"ROOT %f = {_tuple(n)} fusion({_names('%a', n)}), kind=kLoop, calls=%fused"
    return _program([f"%x = {_X} parameter(0)", *arrays, call], body)


def donated(n: int) -> str:
    """Elements of one tuple, each donated to an output."""
    aliases = ", ".join(f"{{{k}}}: (0, {{{k}}}, may-alias)" for k in range(n))
    parts = [f"%g.{k} = {_X} get-tuple-element(%p), index={k}" for k in range(n)]
    parts += [f"%h.{k} = {_X} tanh(%g.{k})" for k in range(n)]
    entry = [f"%p = {_tuple(n)} parameter(0)", *parts, f"ROOT %t = {_tuple(n)} tuple({_names('%h', n)})"]
    return _program(entry, header=f", input_output_alias={{ {aliases} }}")


def fusions(n: int) -> str:
    """Fusions of one body that is as long as they are many."""
    body = f"%fused () -> f32[] {{\n  %p = {_X} parameter(0)\n  ROOT %q = {_X} tanh(%p)\n}}\n"
    return _program(_chain(n, f"NEW = {_X} fusion(OLD), kind=kLoop, calls=%fused"), body)


def reductions(n: int) -> str:
    """Collectives one after another."""
    return _program(_chain(n, f"NEW = {_X} all-reduce(OLD), channel_id=NUMBER, {_EVERYONE}, to_apply=%add"))


def in_flight(n: int) -> str:
    """Collectives that are all started, then kernels, then the ends of the collectives."""
    result = f"({_X}, f32[8192]{{0}})"
    entry = [f"%x = {_X} parameter(0)"]
    entry += [f"%s.{k} = {result} all-gather-start(%x), dimensions={{0}}, {_EVERYONE}" for k in range(n)]
    entry += [f'%k.{k} = {_X} custom-call(%x), custom_call_target="f"' for k in range(n)]
    entry += [f"%d.{k} = f32[8192]{{0}} all-gather-done(%s.{k})" for k in range(n)]
    return _program([*entry, "ROOT %end = () tuple()"])


def loops(n: int) -> str:
    """Loops one after another, each with computations of its own."""
    state = f"(s32[], {_X})"
    parts, entry = [], [f"%x = {_X} parameter(0)", "%zero = s32[] constant(0)", f"%w.0 = {state} tuple(%zero, %x)"]
    for k in range(n):
        parts.append(
            f"%cond.{k} () -> pred[] {{\n  %c = {state} parameter(0)\n  %i = s32[] get-tuple-element(%c), index=0\n"
            f"  %most = s32[] constant(5)\n  ROOT %less = pred[] compare(%i, %most), direction=LT\n}}\n"
            f"%body.{k} () -> f32[] {{\n  %b = {state} parameter(0)\n  %i = s32[] get-tuple-element(%b), index=0\n"
            f"  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n  %v = {_X} get-tuple-element(%b), index=1\n"
            f"  %y.{k} = {_X} all-reduce(%v), {_EVERYONE}, to_apply=%add\n"
            f"  ROOT %o = {state} tuple(%next, %y.{k})\n}}\n"
        )
        entry += [f"%g.{k} = {_X} get-tuple-element(%w.{k}), index=1", f"%t.{k} = {state} tuple(%zero, %g.{k})"]
        entry += [f"%w.{k + 1} = {state} while(%t.{k}), condition=%cond.{k}, body=%body.{k}"]
    return _program([*entry, "ROOT %end = () tuple()"], *parts)


def wide_loop(n: int) -> str:
    """A loop over many arrays."""
    state = f"(s32[], {_tuple(n)[1:]}"
    body = [f"%b = {state} parameter(0)", "%i = s32[] get-tuple-element(%b), index=0", "%one = s32[] constant(1)"]
    body += ["%next = s32[] add(%i, %one)"]
    body += [f"%g.{k} = {_X} get-tuple-element(%b), index={k + 1}" for k in range(n)]
    body += [f"%h.{k} = {_X} tanh(%g.{k})" for k in range(n)]
    body += [f"ROOT %o = {state} tuple(%next, {_names('%h', n)})"]
    condition = (
        f"%cond () -> pred[] {{\n  %c = {state} parameter(0)\n  %i = s32[] get-tuple-element(%c), index=0\n"
        f"  %most = s32[] constant(5)\n  ROOT %less = pred[] compare(%i, %most), direction=LT\n}}\n"
    )
    entry = [f"%x = {_X} parameter(0)", "%zero = s32[] constant(0)"]
    entry += [f"%t = {state} tuple(%zero{', %x' * n})", f"%w = {state} while(%t), condition=%cond, body=%body"]
    text = "%body () -> f32[] {\n" + "\n".join(f"  {line}" for line in body) + "\n}\n"
    return _program([*entry, "ROOT %end = () tuple()"], condition, text)


def branches(n: int) -> str:
    """Conditionals one after another."""
    body = f"%branch () -> f32[] {{\n  %p = {_X} parameter(0)\n  ROOT %q = {_X} tanh(%p)\n}}\n"
    line = f"NEW = {_X} conditional(%p, OLD, OLD), true_computation=%branch, false_computation=%branch"
    return _program(_chain(n, line, "%p = pred[] parameter(1)"), body)


def numbers(n: int) -> str:
    """One constant of many numbers."""
    rows = ", ".join(["{ 1, 2 }"] * n)
    return _program([f"%c = f32[{n},2]{{1,0}} constant({{ {rows} }})", "ROOT %end = () tuple()"])


FORMS = {
    form.__name__: form
    for form in (
        elementwise, kernels, updates, fused_updates, donated, fusions, reductions, in_flight, loops, wide_loop,
        branches, numbers,
    )
}  # fmt: skip
"""name -> the text of a program with n repeated parts"""
