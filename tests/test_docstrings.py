"""Every public name says what it is, its shapes, its errors and, where published, its source.

Read from the source text, so that what is checked is what a reader of the file sees. Public are the
names that `ppo_kernel` exports, those of the modules below, and the methods of both.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ppo_kernel"
MODULES = (
    *("ops/kl", "ops/logprobs", "ops/masked", "ops/sampling", "rewards", "advantages", "losses"),
    *("rollout/generate", "rollout/decoding", "rollout/lockstep", "rollout/slots"),
    *("evaluation", "metrics"),
    *("learner/state", "learner/optimizer", "learner/gradient", "learner/epochs"),
    *("learner/reports", "donation"),
    *("iteration", "program", "ops/checks", "ops/dtypes", "models/kernels/products"),
    *("sharding", "models/protocol", "models/kv_cache", "models/kernels/cudnn"),
    *("rollout/prompts", "testing/functions", "testing/policies"),
)
FORMULAS = {
    *("gae", "token_rewards", "adaptive_kl_coef", "k1", "k2", "k3", "whiten", "update"),
    *("clipped_policy_loss", "clipped_value_loss", "token_mean", "sequence_mean", "fixed_mean"),
}
"""Published ones: an equation, and a source with its year."""

EQUATIONS = FORMULAS | {
    *("token_logprobs", "entropy", "logprobs_from_hidden", "with_gradient_of", "sampling_noise"),
    *("sample_tokens", "response_values", "is_clipped", "generate", "ppo_iteration"),
}
SOURCES = FORMULAS | {"restrict_logits"}

SHAPED = {"Bool", "Float", "Inexact", "Int", "Key", "Real", "Shaped", "UInt32"}
UNSHAPED = {"Array", "ArrayLike", "ndarray", "PRNGKeyArray"}
CONSTRUCTORS = ("__init__", "__post_init__", "__check_init__")


@dataclass(frozen=True)
class Public:
    """A public function, method or class, and where it stands."""

    label: str
    node: ast.FunctionDef | ast.ClassDef
    module: ast.Module
    owner: ast.ClassDef | None = None

    @property
    def name(self):
        return self.node.name

    @property
    def text(self):
        return ast.get_docstring(self.node) or ""

    @property
    def parameters(self):
        """(name, annotation) of arguments, or of the fields that a class is made from."""
        if isinstance(self.node, ast.ClassDef):
            made_here = [n for n in self.node.body if getattr(n, "name", "") == "__init__"]
            if not made_here:
                fields = [n for n in self.node.body if isinstance(n, ast.AnnAssign)]
                return [(n.target.id, n.annotation) for n in fields if n.target.id[0] != "_"]
            return arguments(made_here[0])
        return arguments(self.node)


def arguments(function):
    every = function.args
    named = [*every.posonlyargs, *every.args, every.vararg, *every.kwonlyargs, every.kwarg]
    return [(a.arg, a.annotation) for a in named if a and a.arg not in ("self", "cls")]


@cache
def parsed(path):
    return ast.parse(path.read_text())


def definitions(tree, kinds=(ast.FunctionDef, ast.ClassDef)):
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def exported(path):
    """(name, path) of what an `__init__.py` re-exports, followed to where it is defined.

    Modules are left out.
    """
    for node in parsed(path).body:
        if isinstance(node, ast.ImportFrom):
            target = path.parent.joinpath(*(node.module or "").split("."))
            package = target / "__init__.py"
            deeper = dict(exported(package)) if package.exists() and target != path.parent else {}
            for alias in node.names:
                place = deeper.get(alias.name, target.with_suffix(".py"))
                if place.exists() and not (target / f"{alias.name}.py").exists():
                    yield alias.name, place


def public_names():
    places = dict.fromkeys(exported(ROOT / "__init__.py"))
    for part in MODULES:
        path = ROOT / f"{part}.py"
        places |= dict.fromkeys((name, path) for name in definitions(parsed(path)))
    for name, path in places:
        tree = parsed(path)
        node = definitions(tree).get(name)
        if node is None or name.startswith("_"):
            continue
        label = f"{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}.{name}"
        yield Public(label, node, tree)
        if isinstance(node, ast.ClassDef):
            for method in definitions(node, ast.FunctionDef).values():
                if not method.name.startswith("_"):
                    yield Public(f"{label}.{method.name}", method, tree, node)


PUBLIC = list(public_names())
BY_NAME = {public.name: public for public in PUBLIC if public.owner is None} | {
    f"{public.owner.name}.{public.name}": public for public in PUBLIC if public.owner
}
every = pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.label)


def section(text, title):
    """The lines under a heading, or ""."""
    found = re.search(rf"^{title}:(.*(?:\n(?: .*)?)*)", text, re.MULTILINE)
    return found.group(1) if found else ""


def mentions(text, name):
    return re.search(rf"(?<![\w.]){name}(?!\w)", text) is not None


def documents(public, name):
    """Whether the list of arguments (else the text) has `name`, or the text says where to look."""
    listed = section(public.text, "Args") + section(public.text, "Attributes")
    owner = "" if public.owner is None else ast.get_docstring(public.owner) or ""
    if mentions(listed or public.text, name) or (not listed and mentions(owner, name)):
        return True
    others = re.findall(r"[Aa]rguments as in\s+`([\w.]+)`", public.text)
    return any(mentions(BY_NAME[other].text, name) for other in others)


def raised(public):
    """Names of the exceptions that its code raises, its module's private helpers included."""
    functions = definitions(public.module, ast.FunctionDef)
    methods = definitions(public.owner, ast.FunctionDef) if public.owner else {}
    start = [public.node]
    if isinstance(public.node, ast.ClassDef):
        start = [n for n in public.node.body if getattr(n, "name", "") in CONSTRUCTORS]
    waiting, seen, names = list(start), set(), set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                names.add(ast.unparse(node.exc.func))
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            for helper in (functions.get(called), methods.get(called.removeprefix("self."))):
                if helper and helper.name.startswith("_") and helper.name not in seen:
                    seen.add(helper.name)
                    waiting.append(helper)
    return names


def without_shape(annotation):
    """The array types of an annotation that stand outside `Float[Array, "..."]` and its like."""
    shaped = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in SHAPED:
            shaped |= set(ast.walk(node))
        # What a policy caches is its own affair: any arrays at all.
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "PyTree":
            shaped |= set(ast.walk(node))
    names = [n for n in ast.walk(annotation) if isinstance(n, ast.Name | ast.Attribute)]
    return {ast.unparse(n) for n in names if ast.unparse(n).split(".")[-1] in UNSHAPED} - {
        ast.unparse(n) for n in names if n in shaped
    }


@every
def test_first_line_is_one_sentence(public):
    assert public.text, f"{public.label} has no docstring"
    first, *rest = public.text.splitlines()
    sentence = re.fullmatch(r"(?:[^.?!]|[.?!](?! [A-Z`]))+[.:]", first)
    assert sentence, f"{public.label}: the first line is not one whole sentence: {first!r}"
    assert not rest or not rest[0], f"{public.label}: no blank line after the first"


@every
def test_every_argument_is_documented(public):
    missing = [name for name, _ in public.parameters if not documents(public, name)]
    assert not missing, f"{public.label} says nothing of {missing}"


@every
def test_arrays_have_shapes(public):
    for name, annotation in public.parameters:
        assert annotation is not None, f"{public.label}: {name} has no annotation"
        bare = without_shape(annotation)
        assert not bare, f"{public.label}: {name} is a {bare} without a shape"
    if isinstance(public.node, ast.FunctionDef):
        returns = public.node.returns
        assert returns is not None, f"{public.label}: the result has no annotation"
        assert not without_shape(returns), f"{public.label}: the result has no shape"


@every
def test_results_are_documented_where_arguments_are(public):
    """A docstring that is one paragraph says the result in it; one with sections has one for it."""
    if isinstance(public.node, ast.ClassDef) or ast.unparse(public.node.returns) == "None":
        return
    if section(public.text, "Args"):
        assert section(public.text, "Returns"), f"{public.label}: `Args:` but no `Returns:`"


@every
def test_errors_are_documented(public):
    missing = {name for name in raised(public) if name not in section(public.text, "Raises")}
    assert not missing, f"{public.label}: `Raises:` lacks {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_published_formulas_name_their_source(name):
    source = re.search(r"Sources?: .*?\b(?:19|20)\d\d\b", BY_NAME[name].text, re.DOTALL)
    assert source, f"{BY_NAME[name].label}: no `Source:` with a year"


@pytest.mark.parametrize("name", sorted(EQUATIONS))
def test_maths_is_written_as_equations(name):
    before_sections = re.split(r"^\w+:$", BY_NAME[name].text, flags=re.MULTILINE)[0]
    equation = re.search(r"^    .*[=~<>]", before_sections, re.MULTILINE)
    assert equation, f"{BY_NAME[name].label}: no equation on an indented line"


CITATION = re.compile(r"\bSources?: |(?:\bet al\.|& [A-Z]\w+) (?:19|20)\d\d\b")
LINK = re.compile(r"https?://\S+\.\S+")


def prose(path):
    """(line, text) of every docstring, and of every string that explains a constant."""
    for node in ast.walk(parsed(path)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield node.lineno, " ".join(value.value.split())


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_source_has_a_link(path):
    for line, text in prose(path):
        sources = CITATION.search(text)
        assert not sources or LINK.search(text), f"{path}:{line} cites {sources} without a link"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_published_formula_links_each_of_its_sources(name):
    text = " ".join(BY_NAME[name].text.split())
    cited = re.findall(r"[A-Z]\w+(?: et al\.| & [A-Z]\w+)? (?:19|20)\d\d", text)
    assert len(set(LINK.findall(text))) >= len(set(cited)), f"{cited}: a link for each"
