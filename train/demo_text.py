"""Generate small stories from a grammar, to try all of training without a download.

    python -m train.demo_text [--out data/demo/stories.txt] [--stories 3000] [--seed 1]

`make train-demo` begins with it. The same seed gives the same file, byte for byte. A model that is trained on these
stories writes sentences of this grammar only: it shows that training works, not what a model of its size can learn.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from tinylm.system.files import check_own, write_file
from tinylm.terminal.output import one_line_errors, say
from train.data.sources import DOCUMENT_SEPARATOR

NAMES = {
    "she": ["Anna", "Bella", "Cora", "Dora", "Ella", "Fay", "Greta", "Hanna", "Ida", "Lily", "Mina", "Nora", "Rosa"],
    "he": ["Adam", "Ben", "Carl", "Dan", "Emil", "Finn", "Gus", "Hugo", "Ivan", "Leo", "Max", "Otto", "Tom"],
}
ANIMALS = ["mouse", "fox", "bear", "rabbit", "duck", "frog", "hen", "goat", "cat", "dog", "hedgehog", "squirrel"]
QUALITIES = ["little", "brave", "shy", "clever", "lazy", "merry", "gentle", "curious", "hungry", "careful"]
PLACES = [
    "in a house by the river",
    "under an old oak tree",
    "at the edge of the forest",
    "on a green hill",
    "behind the mill",
    "near a quiet pond",
    "in a hole under the barn",
    "at the end of the village",
]
COLOURS = ["red", "blue", "yellow", "green", "white", "golden"]
THINGS = ["kite", "ball", "boat", "hat", "drum", "lamp", "basket", "bell"]
GIVERS = ["grandmother", "mother", "uncle", "best friend", "old neighbour"]
TIMES = ["One morning", "One windy day", "The next day", "One evening", "On a rainy afternoon"]
# What happens to the thing, and how a helper solves it.
TROUBLES = [
    (
        "the wind took the {thing} and carried it up into a tall tree",
        "climbed up to the highest branch and threw it down",
    ),
    ("the {thing} fell into the deep water", "jumped into the water and brought it back"),
    ("a big crow came and stole the {thing}", "followed the crow to its nest and asked for it politely"),
    ("the {thing} rolled down into a dark hole", "crept into the hole with a candle and pulled it out"),
    ("the {thing} was lost in the long grass", "looked behind every stone until it was found"),
    ("somebody stepped on the {thing} and it broke", "sat down with some glue and string and mended it"),
]
FEELINGS = ["began to cry", "sat down and sighed", "did not know what to do", "felt very sad", "called for help"]
THANKS = [
    '"Thank you!" said {name}. "You are a true friend."',
    '"How kind you are!" said {name}, and they hugged each other.',
    '"Let us play together," said {name}, and so they did.',
    "{name} laughed and gave {helper} a piece of cake.",
]
MORALS = [
    "From that day on they were the best of friends.",
    "That night {name} slept well and dreamed of the {thing}.",
    "And {name} learned that it is good to ask for help.",
    "And {name} never forgot to share the {thing} with others.",
    "They went home together, and there was soup for supper.",
]


def story(rng: random.Random) -> str:
    """Return a story: somebody gets a thing, loses it, and gets help."""
    pronoun = rng.choice(sorted(NAMES))
    name = rng.choice(NAMES[pronoun])
    helper = rng.choice([other for names in NAMES.values() for other in names if other != name])
    animal, helper_animal = rng.sample(ANIMALS, 2)
    thing = rng.choice(THINGS)
    trouble, help_ = rng.choice(TROUBLES)
    words = {"name": name, "helper": helper, "thing": thing}
    quality = rng.choice(QUALITIES)
    opening = (
        f"Once upon a time there was a {quality} {animal} called {name}. "
        f"{pronoun.capitalize()} lived {rng.choice(PLACES)}."
    )
    wish = rng.choice(
        [
            f"{name} had always wanted a {rng.choice(COLOURS)} {thing}, and one day "
            f"{name}'s {rng.choice(GIVERS)} gave {name} one.",
            f"What {name} liked best in all the world was a {rng.choice(COLOURS)} {thing}.",
            f"For {name}'s birthday there was a {rng.choice(COLOURS)} {thing}, a gift from {name}'s "
            f"{rng.choice(GIVERS)}.",
        ]
    )
    lost = f"{rng.choice(TIMES)} {trouble}. {name} {rng.choice(FEELINGS)}."
    helped = f"Then {helper} the {helper_animal} came by. {helper} {help_}."
    end = f"{rng.choice(THANKS)} {rng.choice(MORALS)}"
    paragraphs = [f"{opening} {wish}", f"{lost} {helped}", end]
    return "\n".join(paragraph.format(**words) for paragraph in paragraphs)


def demo_text(n_stories: int, seed: int) -> str:
    """Return `n_stories` stories, separated by lines of DOCUMENT_SEPARATOR; the same seed gives the same text."""
    rng = random.Random(seed)
    return f"\n{DOCUMENT_SEPARATOR}\n".join(story(rng) for _ in range(n_stories)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo/stories.txt"), help="default: %(default)s")
    parser.add_argument("--stories", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    with one_line_errors(ValueError):
        arguments = parser.parse_args()
        if arguments.stories < 1:
            raise ValueError(f"--stories is {arguments.stories}: it must be at least 1")
        text = demo_text(arguments.stories, arguments.seed)
        if arguments.out.is_file():
            check_own(arguments.out, lambda content: content.startswith(b"Once upon a time there was a "))
        write_file(arguments.out, text)
        say(f"{arguments.out}: {arguments.stories:,} stories, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
