"""XLA's own count of a program's products and collectives, one instruction at a time.

A product counts as XLA's cost analysis counts a program that holds nothing else; a library's product by its right
operand; a collective by the bytes of its result, as XLA counts them, and the group that XLA's rules give.
"""

import functools
import re

PRODUCTS = ("dot", "convolution", "ragged-dot", "scaled-dot")
GEMM = re.compile("gemm|matmul")
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
IRRELEVANT = ("metadata", "backend_config", "sharding", "frontend_attributes", "control-predecessors")
"""attributes that name what a program of one instruction lacks"""


@functools.cache
def xla():
    """(a CPU client, the module with XLA's parser, its cost analysis); private names, as JAX has no public ones."""
    import jax
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]
    from jaxlib import _hlo  # pyright: ignore[reportAttributeAccessIssue]

    jax.config.update("jax_platforms", "cpu")
    return jax.devices("cpu")[0].client, _hlo, xla_client._xla.hlo_module_cost_analysis  # pyright: ignore[reportPrivateImportUsage]


def count(text: str) -> dict[str, float]:
    """XLA's cost analysis of a text."""
    client, hlo, analysis = xla()
    return analysis(client, hlo.hlo_module_from_text(text))


def shape_of(i) -> str:
    """Shape of an XLA instruction, as text."""
    return re.sub(r"/\*index=\d+\*/", "", i.to_string()).partition(" = ")[2].partition(f" {opcode(i)}(")[0]


def opcode(i) -> str:
    match = re.search(r" = .*?[\]})] ([a-z][\w\-]*)\(", i.to_string())
    return match[1] if match else ""


@functools.cache
def array_bytes(shape: str) -> int:
    """Bytes of an array, by XLA's count of a copy's result."""
    text = f"HloModule m\nENTRY e {{\n  p = {shape} parameter(0)\n  ROOT c = {shape} copy(p)\n}}\n"
    return int(count(text).get("bytes accessedout{}", 0))


def bytes_of(shape: str) -> int:
    return sum(map(array_bytes, re.findall(r"[a-z]\w*\[[^\]]*\](?:\{[^{}]*\})?", shape)))


def product(i) -> float:
    """Operations of one product, by XLA's count of a program that holds only this instruction."""
    head, _, tail = i.to_string().partition(" = ")[2].partition(f" {opcode(i)}(")
    attributes = tail[tail.index(")") + 1 :]
    shapes = [shape_of(operand) for operand in i.operands()]
    operands = ", ".join(f"p{k}" for k in range(len(shapes)))
    parameters = "\n".join(f"  p{k} = {shape} parameter({k})" for k, shape in enumerate(shapes))
    attributes = re.sub(
        r", (metadata|backend_config|sharding|frontend_attributes|control-predecessors)=\{.*", "", attributes
    )
    text = f"HloModule m\nENTRY e {{\n{parameters}\n  ROOT r = {head} {opcode(i)}({operands}){attributes}\n}}\n"
    return count(text).get("flops", 0.0)


def gemm(i) -> float | None:
    """Operations of a library's product, from the right operand; None if the text does not tell its dims."""
    config = re.search(r'"rhs_contracting_dimensions":\s*\[([^\]]*)\]', i.to_string())
    if not config:
        return None
    right = re.search(r"\[([\d,]*)\]", shape_of(i.operands()[1]))
    result = re.search(r"\[([\d,]*)\]", shape_of(i))
    assert right and result
    size = 2.0
    for dim in filter(None, result[1].split(",")):
        size *= int(dim)
    for k in re.findall(r"\d+", config[1]):
        size *= int(right[1].split(",")[int(k)])
    return size


def group_size(line: str, replicas: int, partitions: int) -> int:
    """Devices of a collective's group by XLA's rules: which ids a group lists follows from two attributes."""
    channel, flat = "channel_id=" in line, "use_global_device_ids=true" in line
    alone = not re.search(r" all-to-all(-start)?\(| collective-broadcast(-start)?\(", line)
    everyone = replicas * partitions if flat or (channel and alone) else partitions if channel else replicas
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", mesh[1]))
        return functools.reduce(lambda n, axis: n * int(sizes[axis]), re.findall(r"'(\w+)'", mesh[2]), 1)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", line):
        size = int(iota[1].split(",")[-1])
    else:
        groups = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
        size = max((g.count(",") + 1 for g in re.findall(r"\{([\d,]+)\}", groups[1])), default=0) if groups else 0
    if not size:
        return everyone
    return size * partitions if channel and alone and not flat else size


def received(i, replicas: int, partitions: int) -> int | None:
    """Bytes that a device receives, from the result of a collective; None if it is not counted."""
    op, last = opcode(i).removesuffix("-start"), i
    if op not in COLLECTIVES:
        return None
    while opcode(last).endswith(("-start", "-update")):
        followers = [user for user in last.users() if opcode(user).endswith(("-update", "-done"))]
        if not followers:
            return None
        last = followers[0]
    size, line = bytes_of(shape_of(last)), i.to_string()
    if op == "collective-permute":
        if slices := re.search(r"slice_sizes=\{((?:\{[\d,]*\},?)*)\}", line):  # in place: of the first operand's dtype
            dtype = re.match(r"[(\s]*(\w+)\[", shape_of(i.operands()[0]))
            assert dtype
            size = sum(array_bytes(f"{dtype[1]}[{dims}]") for dims in re.findall(r"\{([\d,]*)\}", slices[1]))
        pairs = re.search(r"source_target_pairs=\{(.*?)\}(?:,|$| )", line.replace("},{", ";"))
        moves = pairs and any(len(set(p.split(","))) > 1 for p in re.split(";", pairs[1].strip("{}")))
        return size if moves else 0
    g = group_size(line, replicas, partitions)
    rules = {
        "all-gather": size * (g - 1) // g, "all-reduce": 2 * size * (g - 1) // g, "reduce-scatter": size * (g - 1),
        "all-to-all": size * (g - 1) // g, "collective-broadcast": size if g > 1 else 0,
    }  # fmt: skip
    return rules.get(op)


def ask_xla(text: str) -> dict:
    """XLA's print of a text, and XLA's count of each of its products and collectives; "refused" if it is no HLO."""
    _, hlo, _ = xla()
    try:
        module = hlo.hlo_module_from_text(text)
    except Exception as error:
        return {"refused": str(error).splitlines()[0]}
    printed = module.to_string()
    header = printed.partition("\n")[0]
    replicas, partitions = (
        int(m[1]) if (m := re.search(rf"{key}=(\d+)", header)) else 1 for key in ("replica_count", "num_partitions")
    )
    products, collectives = {}, {}
    for computation in module.computations():
        for i in computation.instructions():
            op, key = opcode(i), f"{computation.name}/{i.to_string().removeprefix('ROOT ').split(' = ')[0].strip('%')}"
            try:
                if op in PRODUCTS:
                    products[key] = product(i)
                elif op == "custom-call" and GEMM.search(i.to_string()):
                    products[key] = gemm(i)
                else:
                    collectives[key] = received(i, replicas, partitions)
            except Exception as error:
                products[key] = f"{type(error).__name__}: {error}".splitlines()[0]
    if "is_scheduled=true" not in header:
        printed = printed.replace(header, f"{header}, is_scheduled=true", 1)
    return {
        "printed": printed, "products": {k: v for k, v in products.items() if v is not None},
        "collectives": {k: v for k, v in collectives.items() if v is not None},
    }  # fmt: skip
