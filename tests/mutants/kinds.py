"""What is broken: cosmic-ray's mutation operators, and five of our own in its interface."""

import ast
import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators import boolean_replacer, number_replacer
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Name, Number

SHIPPED = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul",
        "BitAnd_BitOr", "BitOr_BitAnd")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt",
        "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceUnaryOperator_Delete_Not", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
    "ReplaceAndWithOr", "ReplaceOrWithAnd",
)  # fmt: skip

NAMES = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "all": "any",
    "argmax": "argmin", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like",
    "expm1": "exp", "square": "abs",
}  # fmt: skip
DROPPED = ("stop_gradient", "upcast", "clamp_log_ratio", "clean", "flip", "upcast_tree")


class OwnOperator(Operator):
    """An operator with at most one mutation a node."""

    def mutation_positions(self, node):
        if self.applies(node):
            yield node.start_pos, node.end_pos

    @classmethod
    def examples(cls):
        return ()


class NextNumber(number_replacer.NumberReplacer):
    """n -> n + 1. The minus of a negative literal belongs to it: -1 becomes -2."""

    def mutation_positions(self, node):
        yield from list(super().mutation_positions(node))[:1]

    def mutate(self, node, index):
        return Number(super().mutate(node, index).value.strip(), node.start_pos, node.prefix)


class NegateCondition(boolean_replacer.AddNot):
    """`if c` -> `if not c`; a lone comparison is negated by its own operators already."""

    def mutation_positions(self, node):
        for position in super().mutation_positions(node):
            condition = node.children[2 if node.type == "test" else 1]
            if condition.type not in ("comparison", "not_test"):
                yield position


class SwapBranches(OwnOperator):
    """where(c, a, b) -> where(c, b, a)."""

    def applies(self, node):
        if called(node) not in ("where", "_select"):
            return False
        return node.children[-1].children[1].type == "arglist"

    def mutate(self, node, index):
        arguments = node.children[-1].children[1].children
        arguments[2], arguments[4] = arguments[4], arguments[2]
        return node


class SwapName(OwnOperator):
    """A function -> its counterpart, from `NAMES`."""

    def applies(self, node):
        return isinstance(node, Name) and node.value in NAMES and is_used(node)

    def mutate(self, node, index):
        node.value = NAMES[node.value]
        return node


class DropCall(OwnOperator):
    """f(x) -> x, for the functions in `DROPPED`."""

    def applies(self, node):
        return called(node) in DROPPED

    def mutate(self, node, index):
        argument = node.children[-1].children[1]
        argument = argument.children[0] if argument.type == "arglist" else argument
        argument.get_first_leaf().prefix = node.get_first_leaf().prefix
        return argument


class ShiftIndex(OwnOperator):
    """x[:, t] -> x[:, t - 1]."""

    def applies(self, node):
        place = node.parent if node.parent and node.parent.type == "subscriptlist" else node
        inside = place.parent and place.parent.type == "trailer" and place.parent.children[0] == "["
        return isinstance(node, Name) and bool(inside) and not node.value[0].isupper()

    def mutate(self, node, index):
        return Name(f"{node.value} - 1", node.start_pos, node.prefix)


OPERATORS = (
    *(get_operator(f"core/{name}")() for name in SHIPPED),
    *(kind() for kind in (NextNumber, NegateCondition, SwapBranches, SwapName, DropCall)),
    ShiftIndex(),
)


@dataclass(frozen=True)
class Mutant:
    """One broken version of a file; `key` changes with its meaning, not with its comments."""

    file: str
    function: str
    line: int
    before: str
    after: str
    source: str
    key: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What names a mutant whatever its line number."""
        return self.file, self.function, self.before, self.after


def called(node) -> str | None:
    """The name of the function that `node` calls with arguments."""
    if node.type not in ("atom_expr", "power") or node.children[-1].type != "trailer":
        return None
    trailer = node.children[-1]
    has_arguments = trailer.children[0] == "(" and len(trailer.children) == 3
    return node.children[-2].get_last_leaf().value if has_arguments else None


def is_used(name) -> bool:
    """Whether the name is a called function, not a keyword or a variable."""
    following = name.get_next_leaf()
    return following is not None and following.value == "("


def is_skipped(node) -> bool:
    """Annotations, imports, decorators, error messages and `zip(strict=...)` are no maths."""
    if node.type == "factor" and node.children[1].type == "number":
        return True  # a negative literal: `NextNumber` has it
    child, parent = node, node.parent
    while parent is not None:
        first = parent.children[0].get_code().strip()
        if (
            parent.type in ("decorator", "import_from", "raise_stmt", "tfpdef")
            or (parent.type == "annassign" and child is parent.children[1])
            or (parent.type == "funcdef" and child is parent.annotation)
            or (parent.type == "parameters" and child.type == "operator")
            or (parent.type == "argument" and first == "strict")
        ):
            return True
        child, parent = parent, parent.parent
    return False


def mutants_of(path: Path, file: str) -> list[Mutant]:
    """Every mutant of a file once, in the order of its lines."""
    source = path.read_text(encoding="utf-8")
    seen, found = {meaning(source)}, []
    for operator in OPERATORS:
        places = [
            node for node in ast_nodes(get_ast(source)) for _ in operator.mutation_positions(node)
        ]
        for occurrence, node in enumerate(places):
            if is_skipped(node):
                continue
            mutated = mutate_code(source, operator, occurrence)
            key = meaning(mutated)
            if key is not None and key not in seen:
                seen.add(key)
                found.append(describe(file, source, mutated, key))
    return sorted(found, key=lambda mutant: (mutant.line, mutant.after))


def meaning(source: str) -> str | None:
    """A hash of the code without comments, layout and docstrings; None where it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            node.body = [x for x in node.body if not is_text(x)] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:20]


def is_text(statement) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def describe(file: str, source: str, mutated: str, key: str) -> Mutant:
    """The mutant with the lines that differ, joined, and the function around them."""
    old, new = source.splitlines(), mutated.splitlines()
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    _, start, stop, new_start, new_stop = next(c for c in changes if c[0] != "equal")
    before, after = (
        " ".join(" ".join(lines).split()) for lines in (old[start:stop], new[new_start:new_stop])
    )
    around = [
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.lineno <= start + 1 <= node.end_lineno
    ]  # fmt: skip
    function = ".".join(node.name for node in sorted(around, key=lambda node: node.lineno))
    return Mutant(file, function, start + 1, before, after, mutated, key)
