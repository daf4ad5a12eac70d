"""What is remembered of a frozen model: the model's own vectors, the same bits whatever was asked before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny import FAMILIES, REQUESTS, UNRELATED, WIDTH, attach, poison, tiny_editor, tiny_model, tiny_tokenizer
from tiny import one_thread as one_thread
from torch import Tensor, nn
from transformers import PreTrainedModel

from baft.engine import company
from baft.engine.continuations import Continuations
from baft.engine.encoding import Encoded, Encoder
from baft.engine.grid import Grid
from baft.engine.options import EngineOptions
from baft.engine.passes import Passes
from baft.engine.replay import Replay
from baft.engine.surroundings import Surroundings
from baft.engine.unrelated import UnrelatedPool

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
EDITS = [
    ENCODER.pair("The capital of Norland is", "Ebor", "Norland"),
    ENCODER.pair("Ada Lund is", "president", "Ada Lund"),
    ENCODER.pair("Paris is the capital of", "Sudland", "Paris"),
]
POOL = UnrelatedPool(UNRELATED, ENCODER)
COMPANY = next(POOL.in_chunks(64))


class Memory:
    """What ``FrozenStates`` remembers of a model whose block 1 is the first that is edited.

    Args:
        together: a subject's texts are computed together, as on a GPU.
    """

    def __init__(self, model: PreTrainedModel | None = None, *, memory: int = 1 << 30, together: bool = False) -> None:
        self.model = model or tiny_model()
        self.attachment = attach(self.model, layers=(1, 2))
        self.surroundings = Surroundings(Continuations(self.model, self.attachment.disabled, ENCODER), ENCODER, 6)
        options = EngineOptions(memory=memory)
        self.passes = Passes(self.model, self.attachment, ENCODER, POOL, self.surroundings, options)
        self.states = self.passes._frozen
        self.company, self.loose = self.passes._company, self.passes._loose
        if together:
            for company in (self.company, self.loose):
                company._all_about = self.surroundings.all_about

    @property
    def set_aside(self) -> int:
        """Bytes that are set aside at present."""
        buffers = [kept._buffer for kept in (self.states._prefixes, self.states._head_inputs)]
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def of(self, texts: Sequence[Encoded]) -> list[tuple[Tensor, Tensor]]:
        """Of each text what the first edited block returns, and what the head is given, asked for in one step."""
        head_inputs = self.states.head_input(texts, self.company).split([len(text.ids) for text in texts])
        return list(zip(self.prefixes_of(texts), head_inputs, strict=True))

    def prefixes_of(self, texts: Sequence[Encoded]) -> list[Tensor]:
        """Of each text what the first edited block returns, and no more."""
        grid = self.passes._lay_out(texts)
        prefix = self.states.prefix(texts, grid, self.company).flatten(0, 1)
        assert prefix.isfinite().all()
        return [prefix[grid.cells(k, 0, len(text.ids))] for k, text in enumerate(texts)]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens are computed, each time that the model is asked."""
    computed: list[int] = []
    observe = Replay.observe

    def watch(replay: Replay, grid: Grid, **how: bool) -> object:
        computed.append(grid.tokens)
        return observe(replay, grid, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Replay, "observe", watch)
        yield computed


def tokens(*texts: Encoded) -> int:
    return sum(len(text.ids) for text in texts)


def assert_same(actual: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]) -> None:
    for one, other in zip(actual, expected, strict=True):
        for vectors, wanted in zip(one, other, strict=True):
            assert vectors.dtype == wanted.dtype
            assert torch.equal(vectors, wanted)


# -- what it is --


def observed_alone(family: str, text: Encoded) -> tuple[Tensor, Tensor]:
    """The same by hooks, of a text that is the whole batch, on a model without interventions."""
    model, seen = tiny_model(family), list[Tensor]()

    def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    model.get_submodule(FAMILIES[family].blocks)[1].register_forward_hook(keep)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([text.ids]), use_cache=False)
    return seen[0][0], seen[1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_unedited_model_computes(family: str) -> None:
    texts = [*EDITS, *COMPANY]
    expected = [observed_alone(family, text) for text in texts]
    for (prefix, head_input), (block, head) in zip(Memory(tiny_model(family)).of(texts), expected, strict=True):
        torch.testing.assert_close(prefix, block, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head_input, head, rtol=1e-4, atol=1e-4)


# -- the same bits --


def test_it_does_not_depend_on_what_was_asked_before_or_together() -> None:
    texts = [*EDITS, *COMPANY]
    expected = Memory().of(texts)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 6, 2, 4]):
        together, one_by_one = Memory(), Memory()
        assert_same(together.of([texts[k] for k in order]), [expected[k] for k in order])
        for k in order:
            assert_same(one_by_one.of([texts[k]]), [expected[k]])
            assert_same(one_by_one.of([texts[k], texts[0]]), [expected[k], expected[0]])


def test_each_text_is_computed_once_and_unrelated_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    with watched(monkeypatch) as computed:
        memory.of(EDITS[:2])
        memory.of([*EDITS, *COMPANY[1:3], EDITS[0]])
        memory.of([*COMPANY, *EDITS])
    assert computed == [tokens(text) for text in EDITS] + [tokens(*COMPANY)]


def test_a_text_that_is_both_edited_and_unrelated_is_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Encoded(COMPANY[2].ids, prompt_length=3, subject=(1, 2))
    expected = Memory().of(COMPANY)[2]
    memory = Memory()
    with watched(monkeypatch) as computed:
        assert_same(memory.of([EDITS[0], shared, COMPANY[2]])[1:], [expected, expected])
    assert sorted(computed) == sorted([tokens(EDITS[0]), tokens(*COMPANY)])


# -- no more than is asked for --


@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_edits_own_text_no_block_beyond_the_first_edited_one_is_computed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, memory = Memory(tiny_model(family)).of(EDITS), Memory(tiny_model(family))
    beyond = memory.attachment.blocks.modules[2]
    with monkeypatch.context() as patched:
        patched.setattr(type(beyond), "forward", refusing_for(beyond))
        prefixes = memory.prefixes_of(EDITS)
        with pytest.raises(AssertionError, match="a block beyond"):
            memory.of(COMPANY)
    for prefix, (wanted, _) in zip(prefixes, expected, strict=True):
        assert torch.equal(prefix, wanted)


def refusing_for(module: nn.Module) -> Callable[..., object]:
    """A forward for its class that this one module refuses."""
    forward = type(module).forward

    def refuse(own: nn.Module, *args: object, **kwargs: object) -> object:
        assert own is not module, "a block beyond the first edited one was run"
        return forward(own, *args, **kwargs)

    return refuse


def test_what_the_head_is_given_is_computed_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, memory = Memory().of(EDITS), Memory()
    with watched(monkeypatch) as computed:
        memory.prefixes_of(EDITS)
        assert_same(memory.of(EDITS[1:]), expected[1:])
        assert_same(memory.of(EDITS), expected)
    assert computed == [tokens(EDITS[k]) for k in (0, 1, 2, 1, 2, 0)]


def test_of_company_both_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    with watched(monkeypatch) as computed:
        memory.prefixes_of(COMPANY)
        memory.of(COMPANY)
    assert sum(computed) == tokens(*COMPANY)


def test_what_is_forgotten_is_forgotten_with_what_the_head_was_given() -> None:
    texts = [Encoded((first, *range(3, 12)), 10) for first in range(20, 40)]
    expected, memory = Memory().of(texts[:1]), Memory(memory=rows_of(tokens(*COMPANY) + 8 * 10))
    memory.of(texts[:1])
    for text in texts[1:9]:  # there is room for eight
        memory.prefixes_of([text])
    memory.prefixes_of(texts[:1])
    assert_same(memory.of(texts[:1]), expected)


def test_an_edits_own_text_takes_no_memory_for_what_the_head_would_be_given() -> None:
    memory = Memory()
    memory.prefixes_of(EDITS)
    # Prefixes alone, behind the rows that the company's have.
    assert memory.states.written_bytes == rows_of(tokens(*COMPANY, *EDITS)) // 2


def test_texts_of_a_pass_are_computed_once_and_no_further_than_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, unrelated = Memory(), Encoded((20, *range(3, 12)), 10, subject=(0, 0))
    with watched(monkeypatch) as computed:
        memory.passes.arrange(EDITS[:1], [unrelated], [0, 0], predictions=True)
    assert computed == [10, tokens(EDITS[0])]


def test_what_the_head_is_given_makes_no_prefix_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Encoded((first, *range(3, 12)), 10) for first in range(20, 28)]
    memory = Memory(memory=rows_of(tokens(*COMPANY) + 8 * 10))
    memory.prefixes_of(texts)
    with watched(monkeypatch) as computed:
        memory.of(texts[:1])
        memory.prefixes_of(texts)
    assert computed == [10]


# -- the budget --


def rows_of(count: int) -> int:
    """Bytes of so many tokens' vectors."""
    return 2 * 4 * WIDTH * count


def test_a_used_up_budget_computes_the_same_bits_again() -> None:
    texts = [*EDITS, *COMPANY]
    plenty = Memory().of(texts)
    for budget in range(tokens(EDITS[0]), 3 * tokens(*texts), 5):
        memory = Memory(memory=rows_of(budget))
        for k in (0, 3, 0, 4, 1, 6, 2, 0, 1, 5, 2, 3):
            for asked in ([k], [0, k]):
                for prefix, other in zip(memory.prefixes_of([texts[2]]), [plenty[2][0]], strict=True):
                    assert torch.equal(prefix, other)  # the text of an edit, in between
                found = memory.of([texts[k] for k in asked])
                assert_same(found, Memory(memory=rows_of(budget)).of([texts[k] for k in asked]))
                if budget >= 2 * tokens(*COMPANY):
                    assert_same(found, [plenty[k] for k in asked])
                for one, other in zip(found, [plenty[k] for k in asked], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_was_computed_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Encoded((first, *range(3, 12)), 10) for first in range(20, 40)]
    memory = Memory(memory=rows_of(tokens(*COMPANY) + 8 * 10))
    with watched(monkeypatch) as computed:
        for text in texts[:8]:  # all that there is room for
            memory.of([text])
        memory.of([texts[8]])
        memory.of(texts[4:9])  # the newer half is still known
        assert len(computed) == 9
        memory.of([texts[0]])
        assert len(computed) == 10
        for text in texts[9:12]:  # the half that makes room next is the one that is older now
            memory.of([text])
        memory.of([texts[8], texts[0], *texts[9:11]])
    assert len(computed) == 13
    assert set(computed) == {10}


def test_unrelated_texts_stay_if_they_take_no_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    company = tokens(*COMPANY)
    texts = [Encoded((first, *range(3, 12)), 10) for first in range(20, 60)]
    memory = Memory(memory=rows_of(2 * company))
    with watched(monkeypatch) as computed:
        for one in texts:
            memory.of([one, COMPANY[0]])
    assert sorted(computed) == sorted([company, *[10] * len(texts)])


def test_of_more_unrelated_texts_than_half_only_those_of_a_step_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(memory=rows_of(2 * tokens(*COMPANY) - 2))
    first, second, third, _ = COMPANY
    asked = [[EDITS[0], first, second], [first, EDITS[1], first, second], [second, EDITS[0], first], [third]]
    with watched(monkeypatch) as computed:
        for texts in asked:
            memory.of(texts)
    both = tokens(first, second)  # the same ones in the same order are asked for again
    assert computed == [both, tokens(EDITS[0]), tokens(EDITS[1]), both, tokens(third)]


def test_a_step_larger_than_the_budget_is_taken_all_the_same() -> None:
    texts = [*EDITS, *COMPANY]
    memory = Memory(memory=1)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [6, 0]):
        chosen = [texts[k] for k in order]
        assert_same(memory.of(chosen), Memory(memory=1).of(chosen))


def test_no_more_memory_is_held_than_the_budget_says() -> None:
    texts = [Encoded(tuple(range(first, first + 60)), 60) for first in range(3, 60)]
    budget = rows_of(60 * len(texts) - 100)
    memory = Memory(memory=budget)
    for one in [*texts, *texts]:
        memory.of([one])
        assert memory.passes.report()["remembered_bytes"] <= memory.set_aside <= budget
    assert memory.passes.report()["remembered_bytes"] >= rows_of(60 * (len(texts) - 5))


@pytest.mark.parametrize("known", [1, len(EDITS)])
@pytest.mark.parametrize("which", [0, 1])
def test_what_could_not_be_written_is_not_known(which: int, known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out while a buffer grows; single edits then go on with fewer abreast."""
    expected, memory = Memory().of(EDITS), Memory()
    memory.of(EDITS[:1])
    memory.prefixes_of(EDITS[:known])
    buffer = (memory.states._prefixes, memory.states._head_inputs)[which]

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(buffer, "_write", refuse)
        with nullcontext() if which == 0 and known > 1 else pytest.raises(torch.OutOfMemoryError):
            memory.of(EDITS)
    assert_same(memory.of(EDITS), expected)


def test_what_one_large_step_needed_is_given_back() -> None:
    long = [Encoded((first, *range(3, 63)), 61) for first in range(20, 24)]
    memory = Memory(memory=rows_of(61))
    memory.of(long)
    assert memory.set_aside == rows_of(4 * 61)
    memory.of(EDITS[:1])
    assert memory.set_aside <= rows_of(61)


# -- changed weights --


def test_nothing_is_computed_again_while_the_weights_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    memory.of(EDITS)
    with watched(monkeypatch) as computed:
        memory.passes.refresh()
        memory.of(EDITS)
    assert computed == []


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"])
@pytest.mark.parametrize("how", ["written to", "loaded", "replaced"])
def test_changed_weights_are_noticed_when_asked_to_look(where: str, how: str) -> None:
    memory = Memory()
    memory.of(EDITS)
    module = memory.model.model.get_submodule(where)
    changed = module.weight.detach() + 0.1 * torch.randn_like(module.weight)
    if how == "written to":
        with torch.no_grad():
            module.weight.copy_(changed)
    elif how == "loaded":
        module.load_state_dict({"weight": changed})
    else:
        module.weight = nn.Parameter(changed)
    memory.passes.refresh()
    fresh = tiny_model()
    fresh.load_state_dict(memory.model.state_dict())
    assert_same(memory.of(EDITS), Memory(fresh).of(EDITS))


def test_another_dtype_is_noticed() -> None:
    memory = Memory()
    memory.of(EDITS)
    memory.model.bfloat16()
    memory.passes.refresh()
    assert_same(memory.of(EDITS), Memory(tiny_model().bfloat16()).of(EDITS))


# -- in an editor --


def test_edits_come_out_alike_with_little_memory() -> None:
    def losses(memory: int) -> list[list[float]]:
        editor = tiny_editor(options=EngineOptions(memory=memory), max_steps=4, stop_below=0.0)
        return [outcome.curve.losses for outcome in editor.edit(REQUESTS[:3])]

    for little, plenty in zip(losses(1), losses(1 << 30), strict=True):
        assert little == pytest.approx(plenty, rel=1e-3)


# -- texts that the unedited model wrote of a subject --


def test_texts_about_a_subject_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, later = Memory(together=True), Memory(together=True)
    texts = memory.surroundings.all_about("Ada Lund")
    assert len(texts) > 2
    with watched(monkeypatch) as computed:
        expected = [memory.of([text])[0] for text in texts]
    assert computed == [tokens(*texts)]
    for k in reversed(range(len(texts))):
        assert_same(later.of([texts[k], EDITS[1]])[:1], expected[k : k + 1])
    with watched(monkeypatch) as computed:
        Memory().of(texts[:2])
    assert computed == [tokens(text) for text in texts[:2]]


def test_the_same_tokens_about_two_subjects_are_two_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another company they may round otherwise, and which was first must not matter."""
    memory = Memory()
    both = [Encoded(EDITS[0].ids, len(EDITS[0].ids), (0, 0), about=subject) for subject in ("Ada", "Ada Lund")]
    beside = {"Ada": [both[0], EDITS[1]], "Ada Lund": [both[1], EDITS[2]]}
    monkeypatch.setattr(memory.company, "_all_about", beside.__getitem__)
    with watched(monkeypatch) as computed:
        memory.of([EDITS[0], *both])
    assert sorted(computed) == sorted([tokens(EDITS[0]), *(tokens(*group) for group in beside.values())])


# -- together --


def asked_together(memory: Memory, texts: Sequence[Encoded]) -> list[tuple[Tensor, Tensor]]:
    head_inputs = memory.states.head_input(texts, memory.loose).split([len(text.ids) for text in texts])
    grid = memory.passes._lay_out(texts)
    prefix = memory.states.prefix(texts, grid, memory.loose).flatten(0, 1)
    prefixes = [prefix[grid.cells(k, 0, len(text.ids))] for k, text in enumerate(texts)]
    return list(zip(prefixes, head_inputs, strict=True))


@pytest.mark.parametrize("together", [False, True])
def test_who_asks_for_texts_together_has_them_computed_at_once(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(together=together)
    about = [text for subject in ("Ada Lund", "Norland") for text in memory.surroundings.all_about(subject)]
    texts = [*EDITS, *about, *COMPANY[:1]]
    expected = Memory().of(texts)
    with watched(monkeypatch) as computed:
        found = asked_together(memory, texts)
    assert computed == [tokens(*COMPANY), tokens(*about), tokens(*EDITS)]
    for one, other in zip(found, expected, strict=True):
        for vectors, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(vectors, wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(company, "_TOGETHER", 2)
    with watched(monkeypatch) as computed:
        memory = Memory()
        memory.states.prefix(EDITS, memory.passes._lay_out(EDITS), memory.loose)
    assert computed == [tokens(*EDITS[:2]), tokens(EDITS[2])]


def test_what_is_no_number_stays_with_its_text() -> None:
    model = tiny_model()
    bad = ENCODER.pair(f"Ada {poison(model)} is", "Ebor", "Ada")
    found = asked_together(Memory(model), [EDITS[0], bad, *EDITS[1:]])
    assert [all(bool(v.isfinite().all()) for v in vectors) for vectors in found] == [True, False, True, True]
