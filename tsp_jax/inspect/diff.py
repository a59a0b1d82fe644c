"""What differs between two programs: memory, communication, products and simulated time.

Programs are compared as the JSON of their reports (`Report.to_json`), so one may come from a file. What they have in
common is found by content, never by the names of instructions, which a compiler numbers anew:

scopes       by their label (pass and named scopes)
collectives  by op, mesh axes and label; without axes if one program's are not known
buffers      by kind, dtype, shape and label; what is left, by kind, dtype and label

A figure that one program does not tell is None, and its difference is not known. What a program does not have is 0.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from tsp_jax.inspect.report_json import CollectiveJson, ReportJson
from tsp_jax.inspect.scopes import readable_scope

_ALIKE = 1e-9
"""relative difference up to which figures are equal: sums are rounded"""
_NO_FIGURE = "?"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A figure of both programs; None: not known."""

    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """After minus before; None if one is not known."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def ratio(self) -> float | None:
        """After over before; None if one is not known, or before is 0 and after is not."""
        if self.before is None or self.after is None:
            return None
        return self.after / self.before if self.before else (None if self.after else 1.0)

    @property
    def differs(self) -> bool:
        """Whether the figures are unequal beyond rounding, or only one is known."""
        if self.before is None or self.after is None:
            return self.before is not self.after
        return abs(self.after - self.before) > _ALIKE * max(abs(self.before), abs(self.after))


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Something of which at least one figure differs."""

    key: tuple[str, ...]
    figures: Mapping[str, Pair]

    @property
    def state(self) -> str:
        """appeared, disappeared or changed."""
        pairs = [pair for pair in self.figures.values() if pair.before is not None and pair.after is not None]
        if pairs and not any(pair.before for pair in pairs):
            return "appeared"
        return "disappeared" if pairs and not any(pair.after for pair in pairs) else "changed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """What differs between two programs; tables hold only rows that differ, the largest difference first."""

    totals: Mapping[str, Pair]
    """figures of the whole step, equal ones too: step_s and its parts, peak_bytes and its kinds, received, flops"""
    scenarios: Mapping[str, Pair]
    """name of a scenario -> step at its rates"""
    scopes: Sequence[Row]
    collectives: Sequence[Row]
    buffers: Sequence[Row]
    unknown: Sequence[str]
    """lines: what a program does not tell"""

    @property
    def same(self) -> bool:
        """Whether nothing that is known of both differs."""
        pairs = (*self.totals.values(), *self.scenarios.values())
        return not (self.scopes or self.collectives or self.buffers or any(pair.differs for pair in pairs))

    @property
    def holds(self) -> bool | None:
        """Whether the step gets shorter, or longer, in every scenario; None without times or difference."""
        signs = {(pair.difference or 0.0) > 0 for pair in self.scenarios.values() if pair.differs}
        if not signs or any(pair.difference is None for pair in self.scenarios.values()):
            return None
        return len(signs) == 1 and all(pair.differs for pair in self.scenarios.values())

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        tables = {name: getattr(self, name) for name in ("scopes", "collectives", "buffers")}
        rows = {name: [_row_json(row) for row in table] for name, table in tables.items()}
        return {
            "same": self.same, "holds": self.holds, "unknown": list(self.unknown), "totals": _pairs_json(self.totals),
            "scenarios": _pairs_json(self.scenarios), **rows,
        }  # fmt: skip


def _row_json(row: Row) -> dict[str, Any]:
    return {"key": list(row.key), "state": row.state, **_pairs_json(row.figures)}


def _pairs_json(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    return {name: {"before": pair.before, "after": pair.after} for name, pair in pairs.items()}


def diff(
    before: ReportJson | dict[str, Any], after: ReportJson | dict[str, Any], names: tuple[str, str] = ("A", "B")
) -> Diff:  # fmt: skip
    """Compares two reports.

    Args:
      before, after: what `Report.to_json` returns.
      names: of the programs, for lines about what they do not tell.
    """
    both = cast(Both, (before, after))
    return Diff(
        totals=_totals(both), scenarios=_scenarios(both), scopes=_scopes(both), collectives=_collectives(both),
        buffers=_buffers(both), unknown=_unknown(both, names),
    )  # fmt: skip


Both = tuple[ReportJson, ReportJson]
Key = tuple[str, ...]
Figures = dict[Key, dict[str, float | None]]


def _totals(both: Both) -> dict[str, Pair]:
    times = ("step_s", "compute_s", "contention_s", "exposed_comm_s", "exposed_host_s", "comm_s", "host_s", "matmul_s")
    found = {name: Pair(*((each["timeline"] or {}).get(name) for each in both)) for name in times}
    found |= {name: Pair(*((each["memory"] or {}).get(name) for each in both)) for name in ("peak_bytes", "host_bytes")}
    memories = [each["memory"] for each in both]
    for kind in ("state", "residual", "transient"):
        found[kind] = Pair(*(memory["by_kind"].get(kind, 0.0) if memory else None for memory in memories))
    found["received"] = Pair(*(_received(each) for each in both))
    return found | {"flops": Pair(*(each["flops"] for each in both))}


def _received(report: ReportJson) -> float | None:
    """Bytes of all collectives; None if the compiler may still add some."""
    return None if report["missing"] else sum(c["total_bytes"] for c in report["collectives"])


def _scenarios(both: Both) -> dict[str, Pair]:
    steps = [
        {name: times["step_s"] for name, times in timeline["scenarios"].items()}
        if (timeline := each["timeline"])
        else {}
        for each in both
    ]
    return {name: Pair(*(each.get(name) for each in steps)) for name in (steps[0] or steps[1])}


def _scopes(both: Both) -> list[Row]:
    if not all(each["timeline"] for each in both):
        return []
    tables: list[Figures] = []
    for each in both:
        assert each["timeline"] is not None
        scopes = each["timeline"]["scopes"].items()
        tables.append(
            {
                (label,): {
                    "seconds": figures["compute_s"] + figures["exposed_s"],
                    **{name: figures[name] for name in ("compute_s", "exposed_s", "received", "flops")},
                }
                for label, figures in scopes
            }
        )
    return _rows(tables, ("seconds", "received", "flops"))


def _collectives(both: Both) -> list[Row]:
    if any(each["missing"] for each in both):
        return []
    axes = all(c["axis"] != _NO_FIGURE for each in both for c in each["collectives"])
    tables: list[Figures] = []
    for each in both:
        sums: defaultdict[Key, list[CollectiveJson]] = defaultdict(list)
        for c in each["collectives"]:
            sums[c["op"], c["axis"] if axes else _NO_FIGURE, readable_scope(c["scope"])].append(c)
        tables.append({key: _collective_figures(members) for key, members in sums.items()})
    return _rows(tables, ("bytes", "count", "exposed_s"))


def _collective_figures(members: Iterable[CollectiveJson]) -> dict[str, float | None]:
    members = list(members)
    seconds, exposed = (_sum(c[name] for c in members) for name in ("seconds", "exposed_s"))
    hidden = None if seconds is None or exposed is None else max(0.0, 1 - exposed / seconds) if seconds else 1.0
    sizes = {"count": sum(c["count"] for c in members), "bytes": sum(c["total_bytes"] for c in members)}
    return {**sizes, "seconds": seconds, "exposed_s": exposed, "hidden": hidden}


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


def _buffers(both: Both) -> list[Row]:
    if not all(each["memory"] for each in both):
        return []
    tables: list[Figures] = []
    for each in both:
        assert each["memory"] is not None
        table: Figures = {}
        for b in each["memory"]["buffers"]:
            shape = f"{b['dtype']}[{','.join(map(str, b['shape']))}]"
            table[b["kind"], shape, b["scope"]] = {"bytes": b["bytes"], "count": b["count"]}
        tables.append(table)
    left = [{key: tables[k][key] for key in tables[k] if key not in tables[1 - k]} for k in (0, 1)]
    common = [{key: table[key] for key in table if key in tables[1 - k]} for k, table in enumerate(tables)]
    return _rows([a | b for a, b in zip(common, _joined(left), strict=True)], ("bytes", "count"))


def _joined(left: Sequence[Figures]) -> list[Figures]:
    """Buffers that only one program has; where both have some of equal kind, dtype and scope, these under one key."""
    shapes: list[defaultdict[Key, list[Key]]] = [defaultdict(list), defaultdict(list)]
    for found, table in zip(shapes, left, strict=True):
        for kind, shape, scope in table:
            found[kind, shape.partition("[")[0], scope].append((kind, shape, scope))
    result: list[Figures] = [{}, {}]
    for kind, dtype, scope in dict.fromkeys((*shapes[0], *shapes[1])):
        members = [found.get((kind, dtype, scope), []) for found in shapes]
        text = " -> ".join(" ".join(key[1] for key in keys) for keys in members)
        for table, keys, made in zip(left, members, result, strict=True):
            if all(members):
                made[kind, text, scope] = {name: _sum(table[key][name] for key in keys) for name in ("bytes", "count")}
            else:
                made |= {key: table[key] for key in keys}
    return result


def _rows(tables: Sequence[Figures], order: Sequence[str]) -> list[Row]:
    """A row for each key whose figures differ, sorted by the differences of the figures in `order`."""
    names = next((list(figures) for table in tables for figures in table.values()), [])
    rows = []
    for key in dict.fromkeys((*tables[0], *tables[1])):
        # None says that a figure is not known, so what a program does not have is 0, unless its like has no figure.
        known = [table.get(key) for table in tables]
        pairs = {name: Pair(*(_figure(known, k, name) for k in (0, 1))) for name in names}
        if any(pair.differs for pair in pairs.values()):
            rows.append(Row(key, pairs))
    return sorted(rows, key=lambda row: [-abs(row.figures[name].difference or 0.0) for name in order])


def _figure(known: Sequence[Mapping[str, float | None] | None], side: int, name: str) -> float | None:
    own, other = known[side], known[1 - side]
    if own is not None:
        return own[name]
    return None if name == "hidden" or other is None or other[name] is None else 0.0


def _unknown(both: Both, names: tuple[str, str]) -> list[str]:
    lines = []
    for each, name in zip(both, names, strict=True):
        if each["missing"]:
            lines.append(f"{name}: memory, communication and time are not known: {each['missing']}")
        elif each["timeline"] is None:
            lines.append(f"{name}: time is not known without a target")
        told = (reason for figure, reason in each["unknown"].items() if figure != "peak")  # `missing` says so already
        lines += [f"{name}: the text does not tell {reason}" for reason in told]
    untold = [bool(each["collectives"]) and all(c["axis"] == _NO_FIGURE for c in each["collectives"]) for each in both]
    if untold[0] != untold[1]:
        lines.append(f"{names[untold.index(True)]}: mesh axes of collectives are not known without --mesh")
    rates = [_rates(each) for each in both]
    if None not in rates and rates[0] != rates[1]:
        lines.append("the programs were simulated at different rates, so a part of the difference is theirs")
    return lines


def _rates(report: ReportJson) -> frozenset[str] | None:
    """The lines of a report that state the rates of its target."""
    if report["timeline"] is None:
        return None
    return frozenset(line for line in report["timeline"]["assumptions"] if " of memory; " in line or "rates of" in line)
