"""We have the names, order and defaults of every NATTEN release (``data/signatures.json``).

The top level serves 0.20.0 and later, and has the names of all eras in their newest form. Each
stand-in serves its era. A call that a release takes has to be taken here, and to mean the same.
"""

import ast
import importlib
import inspect
import json
import re

import pytest
from signatures import DATA, RELEASES

from natten.modules import NeighborhoodAttentionGeneric

TABLE = json.loads(DATA.read_text(encoding="utf-8"))
ORDER = list(RELEASES)
SERVES = {
    "natten.compat.v014": ORDER[: ORDER.index("0.14.5")],
    "natten.compat.v015": ORDER[ORDER.index("0.14.5") : ORDER.index("0.17.0")],
    "natten.compat.v017": ORDER[ORDER.index("0.17.0") : ORDER.index("0.20.0")],
    "natten": ORDER[ORDER.index("0.20.0") :],
}

#: What differs on purpose: patterns of our names, and the reason.
DIFFERENT = {
    r".*\.v01[45]\.(functional|natten[12]d)\.natten[12]d(qkrpb|av)": (
        "to 0.14.4 there was no `kernel_size`; the number of arguments tells the forms apart"
    ),
    r".*\.v015\.(functional|nested)\.na[123]d_qk_nested": "0.15's third is `rpb`, 0.17's `bias`",
    r".*\.v017\.context\.use_fused_na": "0.17.0 and 0.17.1 left KV parallelism off",
    r".*\.AutotunerContext\.set_.*": "what `use_autotuner` calls; here it sets attributes",
    r".*\.(av|qk)_cross_(for|back)ward": "additional tokens' products, written into a given tensor",
    r".*\.additional_sdpa|.*\.v017\.functional\.merge_attentions|.*\.ops\.merge_attentions": (
        "how 0.17.4 attended additional tokens, by xFormers"
    ),
    r".*\.maybe_torch_compile": "a decorator of its own functions",
    r".*\.experimental\.(?!na\dd$).*|.*\.experimental_na\dd": "what registers its operators",
    r"natten\.functional\.(na3d_qk_with_bias)|natten\.natten3d\.na3d_(av|qk_with_bias)": (
        "0.15 gave an axis numbers of its own; told apart by the integer after the dilation"
    ),
    r"natten\.NeighborhoodAttention": "0.14.4's name is today's 2-D layer; by keyword both are one",
    r"natten\.modules\.Neighborhood.*": "0.20.0's `dim` is `embed_dim` since; by keyword both work",
    r"natten\.functional\.(na[123]d|neighborhood_attention_generic)": (
        "0.20's last, `try_fuse_additional_kv`, gave way to `return_lse`; by keyword both work"
    ),
    r"natten\.functional\.attention": "0.21.5 put `is_causal` first; a number there is an error",
    r"natten\.backends\.(choose|get_compatible)_.*": "0.20.0 took one tensor",
    r"natten\.utils\.device\.get_device_cc": "`device` in 0.20, `device_index` before",
    r"natten\.attn_merge\.(Merge.*|merge_attentions_.*)|.*\.merge_attentions_(fn|compile)": (
        "how 0.20 compiles the merging"
    ),
    r".*\.(\w*_tensor_checks|is_self_attention|check_kernel_schedule|check_tile_shape"
    r"|log_or_raise_error)": "what its kernels can run",
    r"natten\.token_permute\.([A-Z_]+|maybe_\w+|token_permute|token_unpermute)": (
        "0.20's steps; 0.21.5 has one operation each way"
    ),
    r"natten\.utils\.(device|dtype|environment|tuples)\..*": "helpers of its own modules",
    r".*\.flex\.get_.*": "how it calls FlexAttention",
    r".*\.flops\.has_fvcore": "a helper of its tests",
}


def releases(span):
    first, last = map(ORDER.index, span.split())
    return ORDER[first : last + 1]


def cases():
    """Our name, a release, and what the name was in it, once per form and package."""
    for name, spans in TABLE.items():
        for span, what in spans.items():
            for package, served in SERVES.items():
                both = [release for release in releases(span) if release in served]
                newest = package == "natten" and span == list(spans)[-1]
                if both or newest:
                    yield name.replace("natten", package, 1), (both or releases(span))[-1], what


def find(path):
    """The object at ``path``, as ``from module import name`` finds it."""
    module, names = path, []
    while True:
        module, _, name = module.rpartition(".")
        names.insert(0, name)
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:  # it is a class
            pass
    for name in names:
        found = getattr(found, name)
    return found


def definition(what, release):
    """Follow imports to parameters, or to nothing where only the name is known."""
    while what.startswith("= "):
        spans = TABLE.get(what.removeprefix("= "), {})
        what = next((w for span, w in spans.items() if release in releases(span)), "value")
    return None if what in ("class", "value") else what


def theirs(text):
    """``(name, default)`` of a list of parameters, (name,) without a default."""
    arguments = ast.parse(f"def f({text}): ...").body[0].args
    names = [each.arg for each in arguments.args]
    defaults = [(ast.literal_eval(each),) for each in arguments.defaults]
    return [
        (name, *rest) for name, rest in zip(names, [()] * (len(names) - len(defaults)) + defaults)
    ]


def ours(found):
    signature = inspect.signature(found)
    if inspect.isclass(found) and issubclass(found, NeighborhoodAttentionGeneric):
        kinds = {p.kind for p in signature.parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL in kinds:  # the rank comes first
            generic = list(inspect.signature(NeighborhoodAttentionGeneric).parameters.values())
            return generic[1:]
    return [p for p in signature.parameters.values() if p.name != "self"]


def difference(path, release, what):
    """How our ``path`` differs from ``what`` in ``release``; None if it does not differ."""
    try:
        found = find(path)
    except AttributeError:
        return "missing"
    text = definition(what, release)
    if text is None:
        return None
    wanted, given = theirs(text), ours(found)
    if path.endswith(".apply"):
        inspect.signature(found).bind(*wanted)
        return None
    by_position = [p for p in given if p.kind == p.POSITIONAL_OR_KEYWORD]
    for (name, *default), p in zip(wanted, by_position):
        if p.name != name:
            return f"{p.name} stands where {name} is"
        if default and [p.default] != default:
            return f"the default of {name} is {p.default!r}, not {default[0]!r}"
    if len(wanted) > len(by_position):
        return f"{wanted[len(by_position) :]} can not be given by position"
    more = by_position[len(wanted) :]
    required = [p.name for p in more if p.default is p.empty]
    return f"{required} are required" if required else None


@pytest.mark.parametrize("package", SERVES)
def test_signatures(package):
    found = {}
    for path, release, what in cases():
        if path.startswith(f"{package}.") and (package != "natten" or ".compat." not in path):
            differs = difference(path, release, what)
            listed = any(re.fullmatch(pattern, path) for pattern in DIFFERENT)
            if (differs is not None) and not listed:
                found[f"{path} ({release})"] = differs
    assert not found, "\n".join(f"{name}: {text}" for name, text in found.items())


def test_every_listed_difference_is_one():
    found = [path for path, release, what in cases() if difference(path, release, what)]
    for pattern in DIFFERENT:
        assert any(re.fullmatch(pattern, path) for path in found), pattern
