"""The tree of drafts against the plainest model there is: a set of paths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsi_actors.core.tree import DraftTree, Node, Step

Path = tuple[int, ...]


class Model:
    """All paths below the root, each as the tokens behind it, in the order in which they were added."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.position = 7

    def children(self, path: Path) -> list[int]:
        return [each[-1] for each in self.paths if each[:-1] == path]

    def main(self) -> Path:
        path: Path = ()
        while children := self.children(path):
            path = (*path, children[0])
        return path

    def add(self, path: Path, token: int) -> None:
        if (*path, token) not in self.paths:
            self.paths.append((*path, token))

    def advance(self, token: int) -> Step:
        children = self.children(())
        self.paths = [path[1:] for path in self.paths if len(path) > 1 and path[0] == token]
        self.position += 1
        if not children:
            return Step.UNDRAFTED
        return Step.ACCEPTED if children[0] == token else Step.ALTERNATIVE if token in children else Step.CORRECTED

    def lead(self, path: Path) -> None:
        """It goes before all others that follow the same tokens."""
        first = next(place for place, each in enumerate(self.paths) if each[:-1] == path[:-1])
        self.paths.remove(path)
        self.paths.insert(first, path)

    def branches(self, end: int, deepest: int) -> list[Path]:
        """Paths beside the main one before position `deepest`, of branches that leave it before `end`: those that leave it
        first, whole branches at a time."""
        main, found = self.main(), list[Path]()
        for fork in range(len(main)):
            for token in self.children(main[:fork])[1:]:
                found += self._below((*main[:fork], token), deepest)
        return [path for path in found if self.position + _common(path, main) < end]

    def _below(self, path: Path, end: int) -> list[Path]:
        found = [path] if self.position + len(path) < end else []
        for token in self.children(path):
            found += self._below((*path, token), end)
        return found


def _common(one: Path, other: Path) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def path_of(node: Node, root: Node) -> Path:
    path: Path = ()
    while node is not root:
        assert node.parent is not None
        path, node = (node.token, *path), node.parent
    return path


@given(data=st.data())
def test_the_tree_is_its_set_of_paths(data: st.DataObject) -> None:
    tree, model, nodes = DraftTree(1, 7), Model(), dict[int, Node]()
    for _ in range(data.draw(st.integers(0, 25), label="actions")):
        token = data.draw(st.integers(0, 2), label="token")
        match data.draw(st.sampled_from(["add", "add", "add", "lead", "advance", "clear"]), label="action"):
            case "add":
                path = data.draw(st.sampled_from([(), *model.paths]), label="behind")
                parent = tree.root
                for step in path:
                    parent = next(child for child in parent.children if child.token == step)
                node = tree.add(parent, token)
                nodes[id(node)] = node
                model.add(path, token)
            case "lead":
                if model.paths:
                    path = data.draw(st.sampled_from(model.paths), label="which")
                    model.lead(path)
                    node = tree.root
                    for step in path:
                        node = next(child for child in node.children if child.token == step)
                    tree.lead(node)
            case "advance":
                assert tree.advance(token) is model.advance(token)
            case _:
                tree.clear()
                model.paths.clear()
        tree.check()
        assert (tree.root.position, tuple(node.token for node in tree.main)) == (model.position, model.main())
        assert tree.front == model.position + 1 + len(model.main())
        assert tree.main_end.position == tree.front - 1
        below = [node for node in nodes.values() if node.live and node.position > model.position]
        assert sorted(path_of(node, tree.root) for node in below) == sorted(model.paths), "the others are dead"
        end = data.draw(st.integers(model.position, model.position + 9), label="end")
        deepest = data.draw(st.integers(end, end + 3), label="deepest")
        most = data.draw(st.integers(0, 9), label="most")
        branches = tree.branches(end, deepest, most)
        assert [path_of(node, tree.root) for node in branches] == model.branches(end, deepest)[:most]
        for node in below:
            assert tuple(each.token for each in tree.path_to(node)) == path_of(node, tree.root)
        held = {node for node in nodes.values() if data.draw(st.booleans(), label="held")}
        reached = next((node.position for node in tree.main if node not in held), tree.front)
        assert tree.reach(held, tree.main) == reached


def grown() -> tuple[DraftTree, dict[str, Node]]:
    """The tree of the module's head: 7 3 9, beside 3 the branch 4 2, beside 7 the alternative 8."""
    tree = DraftTree(1, 0)
    seven = tree.add(tree.root, 7)
    three = tree.add(seven, 3)
    nine, four, eight = tree.add(three, 9), tree.add(seven, 4), tree.add(tree.root, 8)
    two = tree.add(four, 2)
    return tree, {"7": seven, "3": three, "9": nine, "4": four, "2": two, "8": eight}


def test_branches_that_leave_early_come_first_each_after_its_parent() -> None:
    tree, node = grown()
    assert tree.branches(9, 9, 9) == [node["8"], node["4"], node["2"]]
    assert tree.branches(9, 9, 2) == [node["8"], node["4"]]
    assert tree.branches(3, 3, 9) == [node["8"], node["4"]]
    assert tree.branches(2, 2, 9) == [node["8"]]
    assert tree.branches(2, 9, 9) == [node["8"], node["4"], node["2"]], "4 follows 7, which stands before position 2"


def test_an_alternative_may_take_the_lead() -> None:
    tree, node = grown()
    tree.lead(node["4"])
    assert [each.token for each in tree.main] == [7, 4, 2]
    tree.lead(node["8"])
    assert tree.main == [node["8"]]
    tree.lead(node["3"])
    assert tree.main == [node["8"]], "it does not stand beside the main path"
    tree.check()


def test_an_alternative_that_is_right_takes_its_branch_along() -> None:
    tree, node = grown()
    assert tree.advance(7) is Step.ACCEPTED
    assert not node["8"].live
    assert tree.advance(4) is Step.ALTERNATIVE
    assert [each.token for each in tree.main] == [2]
    assert [name for name in node if node[name].live] == ["7", "4", "2"]
    assert tree.advance(5) is Step.CORRECTED
    assert tree.advance(5) is Step.UNDRAFTED
    tree.check()


def test_the_same_token_again_is_the_same_node() -> None:
    tree, node = grown()
    assert tree.add(node["7"], 4) is node["4"]
    assert tree.add(tree.root, 7) is node["7"]
    assert len(tree.main) == 3
