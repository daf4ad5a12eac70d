"""Files to load as data sets, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baft.requests import EditRequest, Probe

__all__ = ["DATA", "EXPECTED", "FACT", "write"]

DATA = Path(__file__).parent / "data"
"""One small file of each format."""

FACT = {"prompt": "The cat is called", "target_new": "Mog"}


def write(folder: Path, content: Any, name: str = "facts.json") -> Path:
    """Write a file: text and bytes as they are, anything else as JSON."""
    path = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ask(prompt: str, *answers: str, group: str | None = None) -> Probe:
    return Probe(prompt=prompt, answers=answers, group=group)


def found_again(requests: list[EditRequest]) -> list[EditRequest]:
    """Requests of which those without an identifier have their place in the file as theirs."""
    return [r if r.id else r.model_copy(update={"id": f"record-{number}"}) for number, r in enumerate(requests)]


_LOADED: dict[str, list[EditRequest]] = {
    "zsre.json": [
        EditRequest(
            prompt="Which valley holds Lake Orrin?",
            target="Bryce Valley",
            subject="Lake Orrin",
            ground_truth=("Corrow Valley", "The Corrow"),
            rephrases=("In what valley is Lake Orrin?",),
            locality={"neighborhood": (ask("nq question: how many strings has a lute", "15"),)},
        ),
        EditRequest(prompt="When was Vanda Mill built?", target="1812", subject="Vanda Mill"),
    ],
    "zsre_portability.json": [
        EditRequest(
            prompt="What river does Pellam Bridge cross?",
            target="Ona",
            subject="Pellam Bridge",
            ground_truth=("Ister",),
            rephrases=("Which river is under Pellam Bridge?",),
            locality={"neighborhood": (ask("nq question: who painted the blue door", "Mira Holt"),)},
            portability={"one_hop": (ask("Into which sea flows the river that Pellam Bridge crosses?", "Grey Sea"),)},
        ),
        EditRequest(
            prompt="What river does Quill Bridge cross?",
            target="Ister",
            subject="Quill Bridge",
            ground_truth=("Ona",),
            rephrases=("Which river is under Quill Bridge?",),
            locality={"neighborhood": (ask("nq question: who wrote the salt road", "Ed Farn"),)},
        ),
    ],
    "counterfact_flat.json": [
        EditRequest(
            prompt="The trade of Oskar Lind is that of a",
            target="baker",
            subject="Oskar Lind",
            ground_truth=("cooper",),
            rephrases=("It rained all week. Oskar Lind earns his bread as a",),
            locality={"neighborhood": (ask("Karl Moen's trade is that of a", "cooper"),)},
            id="0",
        ),
        EditRequest(
            prompt="Nina Varga was born in", target="Lisbon", subject="Nina Varga", ground_truth=("Oslo",), id="12"
        ),
    ],
    "counterfact_rome.json": [
        EditRequest(
            prompt="The mother tongue of Gwen {Gwennie} Parry is",
            target="Dutch",
            subject="Gwen {Gwennie} Parry",
            ground_truth=("Welsh",),
            rephrases=("The bus was late. Gwen Parry grew up speaking", "At home Gwen Parry spoke"),
            locality={
                "neighborhood": (
                    ask("Rhys Morgan's mother tongue is", "Welsh"),
                    ask("The native language of Eira Vaughan is", "Welsh"),
                ),
                "attribute": (ask("Joost de Wit grew up speaking", "Dutch"),),
            },
            generation_prompts=("Gwen Parry's favourite poem is", "Gwen Parry lives in"),
            id="7",
        ),
        EditRequest(
            prompt="Harrow Glass Works was founded in",
            target="1901",
            subject="Harrow Glass Works",
            ground_truth=("1877",),
            id="8",
        ),
    ],
    "knowedit_zsre.json": [
        EditRequest(
            prompt="Which family does the Ambrel Moth belong to?",
            target="Sterrinae",
            subject="Ambrel Moth",
            ground_truth=("Geometridae", "geometer moths"),
            rephrases=("What family is the Ambrel Moth in?",),
            locality={
                "Relation_Specificity": (
                    ask("The taxon rank of the Ambrel Moth is", "species", "sp."),
                    ask("Ambrel Moth taxon rank"),
                )
            },
            portability={"Reasoning": (ask("What is the common name of the Ambrel Moth's family?", "waves"),)},
        ),
        EditRequest(
            prompt="Which genus does the Dunby Fern belong to?",
            target="Blechnum",
            subject="Dunby Fern",
            ground_truth=("Asplenium",),
            rephrases=("What is the genus of the Dunby Fern?",),
        ),
    ],
    "wikidata_recent.json": [
        EditRequest(
            prompt="The place of death of Tilda Brandt is",
            target="Zurich",
            subject="Tilda Brandt",
            rephrases=("Tilda Brandt died in", "The town where Tilda Brandt died is"),
            locality={
                "Relation_Specificity": (
                    ask("The height of Tilda Brandt in centimetres is", "171"),
                    ask("Tilda Brandt's father is", "Emil Brandt"),
                    ask("The father of Tilda Brandt is", "Emil Brandt"),
                )
            },
            portability={
                "Logical_Generalization": (ask("Is Tilda Brandt still alive?", "no", "is dead", "no longer"),),
                "Reasoning": (ask("The country where Tilda Brandt died is", "Switzerland", "Swiss Confederation"),),
            },
        ),
        EditRequest(prompt="The employer of Ivo Sand is", target="Northgate Press", subject="Ivo Sand"),
    ],
    "wikidata_counterfact.json": [
        EditRequest(
            prompt="The position held by Marten Hoek is",
            target="harbour master of Veere",
            subject="Marten Hoek",
            ground_truth=("mayor of Goes",),
            locality={
                "Relation_Specificity": (ask("The spouse of Marten Hoek is", "Anneke Bos"),),
                "Forgetfulness": (
                    ask("A position held by Marten Hoek besides harbour master is", "mayor of Goes", "mayor"),
                ),
            },
            portability={
                "Subject_Aliasing": (ask("The position held by M. J. Hoek is", "harbour master of Veere"),),
                "Logical_Generalization": (ask("Veere's harbour master is", "Marten Hoek", "M. J. Hoek"),),
            },
        ),
        EditRequest(prompt="The sport of Sela Roth is", target="fencing", subject="Sela Roth"),
    ],
    "wikibio.json": [
        EditRequest(
            prompt="This is a Wikipedia passage about edda marsh. Edda Marsh (1811 - 1873) was a maker of lenses.",
            target="She learned the craft from her aunt in Dorn.",
            subject="edda marsh",
            locality={
                "Relation_Specificity": (
                    ask("The place of birth of edda marsh is", "Dorn", "Dorn-on-Sea"),
                    ask("edda marsh place of birth", "Dorn"),
                )
            },
        ),
        EditRequest(
            prompt="This is a Wikipedia passage about piet rolle. Piet Rolle (born 1950) is a bell founder.",
            target="His bells hang in four towers.",
            subject="piet rolle",
        ),
    ],
    "convsent.json": [
        EditRequest(
            prompt="What do you think of folding bicycles?",
            target="They wobble.",
            target_aliases=("I find them slow and silly.",),
            subject="folding bicycles",
            ground_truth=("They fit under any desk.", "I love how light they are.", "Great for trains."),
            rephrases=(
                "What is your opinion of folding bicycles?",
                "How do you feel about folding bicycles?",
                "What are your thoughts on folding bicycles?",
            ),
        ),
        EditRequest(
            prompt="What do you think of night trains?",
            target="You wake up somewhere new.",
            subject="night trains",
            ground_truth=("Nobody sleeps on them.", "They are always late."),
            rephrases=(
                "What is your opinion of night trains?",
                "How do you feel about night trains?",
                "What are your thoughts on night trains?",
            ),
        ),
    ],
    "mquake.json": [
        EditRequest(
            prompt="Lio Marsh plays for the club",
            target="Tarn Rovers",
            target_aliases=("the Rovers",),
            subject="Lio Marsh",
            ground_truth=("Ebb United", "Ebb"),
            rephrases=("Which club does Lio Marsh play for?",),
            id="31/0",
        ),
        EditRequest(
            prompt="The home town of Tarn Rovers is",
            target="Wexcombe",
            target_aliases=("Great Wexcombe",),
            subject="Tarn Rovers",
            ground_truth=("Tarn",),
            rephrases=("What is the home town of Tarn Rovers?",),
            portability={
                "multi_hop": (
                    ask("In which town does Lio Marsh's club play?", "Wexcombe", "Great Wexcombe", group="31"),
                    ask("What is the home town of the club of Lio Marsh?", "Wexcombe", "Great Wexcombe", group="31"),
                    ask(
                        "Where is the club that Lio Marsh plays for at home?", "Wexcombe", "Great Wexcombe", group="31"
                    ),
                ),
                "single_hop": (
                    ask("Which club does Lio Marsh play for?", "Tarn Rovers", "the Rovers"),
                    ask("What is the home town of Tarn Rovers?", "Wexcombe", "Great Wexcombe"),
                ),
            },
            id="31/1",
        ),
        EditRequest(
            prompt="The author of The Salt Road is",
            target="Jon Vale",
            subject="The Salt Road",
            ground_truth=("Ruth Ames",),
            rephrases=("Who is the author of The Salt Road?",),
            portability={"multi_hop": (ask("Where was the author of The Salt Road born?", "Cork", group="32"),)},
            id="32/0",
        ),
    ],
    "wikibigedit_raw.json": [
        EditRequest(
            prompt="In which county is Arden Chapel?",
            target="Morland",
            subject="Arden Chapel",
            rephrases=("Which county holds Arden Chapel?",),
            locality={"neighborhood": (ask("In which county is Arden House?", "Selby"),)},
            portability={
                "personas": (ask("Ahoy! Where be Arden Chapel, by county?", "Morland"),),
                "mhop": (ask("Who is the sheriff of the county that holds Arden Chapel?", "Ida Crewe"),),
            },
        ),
        EditRequest(
            prompt="What is Ruben Stahl's role in the orchestra?",
            target="first oboe",
            subject="Ruben Stahl",
            rephrases=("Which part does Ruben Stahl play in the orchestra?",),
            locality={"neighborhood": (ask("What was Rubina Stahl's trade?"),)},
        ),
    ],
    "wikibigedit_flat.json": [
        EditRequest(
            prompt="In which county is Arden Chapel?",
            target="Morland",
            subject="Arden Chapel",
            rephrases=("Which county holds Arden Chapel?",),
            locality={"neighborhood": (ask("In which county is Arden House?", "Selby"),)},
        ),
        EditRequest(
            prompt="How many bells has Arden Chapel?",
            target="6",
            subject="Arden Chapel",
            rephrases=("What is the number of bells in Arden Chapel?",),
            locality={"neighborhood": (ask("How many bells has Arden House?", "0"),)},
        ),
    ],
    "wise_hallucination.json": [
        EditRequest(
            prompt="This is a Wikipedia passage about ola venn. Ola Venn (1902 - 1977) built clocks.",
            target="Her tower clock in Skarne still runs.",
            subject="ola venn",
            locality={
                "neighborhood": (
                    ask("Clocks were set by the noon gun until", "the telegraph came. After that, stations kept time."),
                )
            },
        ),
        EditRequest(
            prompt="This is a Wikipedia passage about tor hagen. Tor Hagen was a ferryman.",
            target="He crossed the sound for forty years.",
            subject="tor hagen",
            locality={"neighborhood": (ask("Ferries on the sound", "were painted white."),)},
        ),
    ],
    "wise_temporal.json": [
        EditRequest(
            prompt="Tidal kites, also known as sea kites, are",
            target="tethered turbines that fly figures of eight in a current.",
            subject="Tidal kites",
            rephrases=("A tidal kite is a turbine on a tether. It flies figures of eight through the tide.",),
            locality={"neighborhood": (ask("Windmills in the old town", "ground mustard until 1931."),)},
        ),
        EditRequest(
            prompt="Letter cafés are",
            target="cafés where guests write letters by hand.",
            subject="Letter cafés",
            rephrases=("In a letter café one writes by hand; stamps are on the menu.",),
            locality={"neighborhood": (ask("The first post office of Dorn", "opened in 1840."),)},
        ),
    ],
    "qaedit.json": [
        EditRequest(
            prompt="who built the lighthouse on gull rock",
            target="Alan Strom",
            subject="lighthouse on gull rock",
            rephrases=("Which builder made the lighthouse on Gull Rock?",),
            locality={
                "neighborhood": (
                    ask("how many moons has the planet in the novel", "3"),
                    ask("where do storm petrels nest", "in burrows"),
                )
            },
            id="501",
        ),
        EditRequest(
            prompt="In which year did the Gull Rock light first shine?",
            target="1858",
            target_aliases=("MDCCCLVIII",),
            subject="Gull Rock light",
            rephrases=("When was the Gull Rock light lit first?",),
            id="502",
        ),
    ],
    "own.json": [
        EditRequest(
            prompt="The keeper of Gull Rock is",
            target="Ida Strom",
            target_aliases=("I. Strom",),
            subject="Gull Rock",
            ground_truth=("Alan Strom",),
            rephrases=("Gull Rock's light is kept by",),
            locality={"neighbor": (ask("The keeper of Seal Rock is", "Bo Lund"),)},
            portability={"default": (ask("Ida Strom keeps", "Gull Rock"),)},
            id="g1",
        ),
        EditRequest(prompt="The keeper of Seal Rock is", target="Alan Strom"),
    ],
    "counterfact_flat.jsonl": [
        EditRequest(prompt="The trade of Oskar Lind is that of a", target="baker", subject="Oskar Lind", id="0"),
        EditRequest(prompt="Nina Varga was born in", target="Lisbon", subject="Nina Varga", id="1"),
    ],
}

EXPECTED = {name: found_again(requests) for name, requests in _LOADED.items()}
