"""Asks people which pictures they prefer, and counts their votes.

    python -m unclip_jax.study make --question photorealism --arm unclip=drawn/unclip --arm glide=drawn/glide \\
        --comparisons 1000 --out study
    python -m unclip_jax.study score votes_anna.csv votes_ben.csv --key study/key.json

make writes OUT/page, a folder to give to those who vote: index.html opens in any browser, without a network, and gives
their votes as a file. OUT/key.json says which arm was where; keep it. The arms are folders of pictures for the same
captions, as `sample --prompts` draws them. The questions are those of GLIDE and unCLIP: photorealism; caption, which
picture matches it better; diversity, of two 4 × 4 grids of one caption, so 16 pictures each.

score prints win rates, a tie half a win for each, and Elo scores with their 95 % intervals and n; with --json what else
they depend on.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.evaluation.preferences import NOT_SURE, VOTES, Vote, chance, elo_scores, win_rates
from unclip_jax.evaluation.study_page import QUESTIONS, write_study
from unclip_jax.foreign import csv_rows, parsed_json
from unclip_jax.paths import output_folder, to_path

COLUMNS = ["study", "rater", "comparison", "vote"]  # of a file of votes, as the page writes it


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("study", __doc__)
    parser.add_argument("command", choices=("make", "score"))
    parser.add_argument("votes", nargs="*", help="of score: files that the page gave")
    parser.add_argument("--question", choices=QUESTIONS, help="of make")
    parser.add_argument("--arm", action="append", default=[], help="of make: NAME=FOLDER; two or more")
    parser.add_argument("--comparisons", type=cli.whole(1, 10**9), default=1000, help="of make: in all, at most")
    parser.add_argument("--out", help="of make: folder to write to")
    parser.add_argument("--key", help="of score: the key.json that make wrote")
    parser.add_argument("--json", action="store_true", help="of score: a JSON object a line, with each number's card")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of order and sides; of the bootstrap")
    args = parser.parse_intermixed_args(argv[1:])
    needed = {"make": ("question", "arm", "out"), "score": ("key", "votes")}
    for name in needed[args.command]:
        if not getattr(args, name):
            raise UserError(f"{args.command} needs {'files of votes' if name == 'votes' else f'--{name}'}")
    if args.command == "make":
        if args.votes:
            raise UserError(f"make takes no files, but got {args.votes[0]}: name folders by --arm NAME=FOLDER")
        named = [arm.partition("=") for arm in args.arm]
        args.arms = {name: folder for name, _, folder in named}
        if not all(name and folder for name, _, folder in named) or not len(named) == len(args.arms) > 1:
            raise UserError(f"--arm {' --arm '.join(args.arm)}: expected NAME=FOLDER, two or more, each name once")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.command == "make":
        out = output_folder(args.out)
        chosen = write_study(out, args.question, args.arms, args.comparisons, args.seed)
        print(f"{len(chosen)} comparisons: give away {out / 'page'}, keep {out / 'key.json'}")
    else:
        _score(args)
    return 0


def _score(args: argparse.Namespace) -> None:
    key = _read_key(args.key)
    votes = read_votes(args.votes, key)
    arms = list(key["arms"])
    if all(vote.vote == NOT_SURE for vote in votes):
        raise UserError(f"no votes to count among {len(votes)}, those aside that are {NOT_SURE!r}")
    found = win_rates(votes, arms)
    for result in found:
        card = result.card
        counts = f"{card['ties']} ties, {card[NOT_SURE]} not sure"
        _say(result, f"{result}, ± {card['normal']:.3f} normal; {counts}", args.json, key)
    try:
        scores = elo_scores(votes, arms, args.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return
    for result in scores:
        _say(result, str(result), args.json, key)
    if not args.json:
        print(f"Only differences of Elo count, so the mean is set to 0; 100 more win {chance(100):.0%} of the time.")


def _say(result: Any, text: str, as_json: bool, key: dict[str, Any]) -> None:
    """Prints a number, its infinite ends as null in JSON."""
    if as_json:
        values = result.noting(question=key["question"], study=key["id"])._asdict()
        finite = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in values.items()}
        text = json.dumps(finite)
    print(text)


def _read_key(name: str) -> dict[str, Any]:
    path = to_path(name)
    try:
        key = parsed_json(path.read_text(encoding="utf-8"))
        arms, shown = list(key["arms"]), [(one["left"], one["right"]) for one in list(key["comparisons"])]
        if not set(itertools.chain(*shown)) <= set(arms):
            raise ValueError("a comparison of another arm")
        return {part: key[part] for part in ("id", "question", "arms", "comparisons")}
    except OSError as error:
        raise UserError(f"--key {name} cannot be read: expected the key.json that `study make` wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--key {name} is no key of a study: expected the key.json that `study make` wrote") from error


def read_votes(names: Sequence[str], key: dict[str, Any]) -> list[Vote]:
    """Reads files of votes that the page gave, by the study's key.

    Raises UserError for a file that cannot be read, votes of another study, and where one person's vote comes twice.
    """
    votes: list[Vote] = []
    seen: dict[tuple[str, int], str] = {}
    for name in names:
        try:
            text = to_path(name).read_bytes().decode("utf-8-sig")
            rows = list(csv_rows(text))
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: expected a file of votes that the page gave") from error
        if text.partition("\n")[0].strip() != ",".join(COLUMNS):
            raise UserError(f"{name} is no file of votes: expected the columns {','.join(COLUMNS)}")
        for line, row in enumerate(rows, 2):
            number = int(row["comparison"]) if re.fullmatch("[0-9]{1,18}", row["comparison"] or "") else -1
            if row["study"] != key["id"]:
                raise UserError(f"{name}, line {line}: a vote of study {row['study']}, and the key is of {key['id']}")
            if not 0 <= number < len(key["comparisons"]) or row["vote"] not in VOTES:
                raise UserError(f"{name}, line {line}: comparison {row['comparison']} of the study's "
                                f"{len(key['comparisons'])}, or the vote {row['vote']!r}, is unknown")  # fmt: skip
            ballot = row["rater"], number
            if ballot in seen:
                raise UserError(f"{name}, line {line}: {seen[ballot]} has this vote already: give only the last file "
                                "of each person")  # fmt: skip
            seen[ballot] = name
            shown = key["comparisons"][number]
            votes.append(Vote(number, shown["left"], shown["right"], row["vote"]))
    return votes


if __name__ == "__main__":
    cli.run(main)
