"""In which company the unedited model computes a text: another one may round otherwise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from baft.engine.encoding import Encoded

__all__ = ["Company", "Group", "LooseCompany"]

# So many texts at most are computed together that don't have to be.
_TOGETHER = 256

Group = Sequence[Encoded]
"""Texts that are computed together, if one of them is."""


class Company:
    """Each text comes with its group, and with no others.

    So what it gives doesn't depend on what else was asked for: a run that was interrupted and resumed gets the same
    bits. (Of frequent texts that there is no room to keep ``FrozenStates`` computes those of a step together, which are
    the same then, too.)

    Args:
        frequent: groups of texts that are asked for all the time, a few of many at each step.
        all_about: by subject the group of texts that the unedited model wrote of it; None computes each of them alone,
            as every other text.

    Attributes:
        frequent_tokens: the keys of frequent texts, and how many tokens each has.
    """

    def __init__(self, frequent: Iterable[Group], all_about: Callable[[str], Group] | None) -> None:
        known = [(_name(text), text, group) for group in frequent for text in group]
        self.frequent_tokens: Mapping[Hashable, int] = {name: len(text.ids) for name, text, _ in known}
        self._group_of = {name: group for name, _, group in known}
        self._all_about = all_about

    def is_frequent(self, text: Encoded) -> bool:
        return _name(text) in self._group_of

    def stays(self, text: Encoded) -> bool:
        """Whether a text shall stay as it is: it is unrelated, or tells of a subject what isn't edited."""
        return text.about is not None or self.is_frequent(text)

    def key(self, text: Encoded) -> Hashable:
        """What a text's vectors are known by: those of another company have another."""
        return _name(text)

    def groups(self, texts: Iterable[Encoded]) -> list[Group]:
        """The groups that texts are in, each once."""
        groups: dict[Hashable, Group] = {}
        for text in texts:
            group = self._group(text)
            groups.setdefault(_name(group[0]), group)
        return list(groups.values())

    def sizes(self, groups: Iterable[Group]) -> dict[Hashable, int]:
        """The keys of all texts of groups, and how many tokens each has."""
        return {self.key(text): len(text.ids) for group in groups for text in group}

    def at_once(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Which groups are computed at once."""
        return [[group] for group in groups]

    def _group(self, text: Encoded) -> Group:
        if text.about is not None and self._all_about is not None:
            return self._all_about(text.about)
        return self._group_of.get(_name(text), (text,))


class LooseCompany(Company):
    """Groups come with others that are asked for at once, but for frequent ones: for who has given the same bits up."""

    def key(self, text: Encoded) -> Hashable:
        return _name(text) if self.is_frequent(text) else (_name(text), "loose")

    def at_once(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Those of subjects, and all others, up to ``_TOGETHER`` texts."""
        passes = [[group] for group in groups if self.is_frequent(group[0])]
        for about in (True, False):
            texts = _TOGETHER
            for group in groups:
                if not self.is_frequent(group[0]) and (group[0].about is not None) == about:
                    texts += len(group)
                    if texts > _TOGETHER:
                        passes.append([])
                        texts = len(group)
                    passes[-1].append(group)
        return passes


def _name(text: Encoded) -> Hashable:
    """What is the same text: also of texts with the same tokens, those about different subjects are different."""
    return text.ids if text.about is None else (text.about, text.ids)
