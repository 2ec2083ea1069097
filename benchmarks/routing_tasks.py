"""The twenty tasks of benchmarks/routing.py, from the public data in ../shared/data and Python's own library.

Each is split once, by a fixed seed, into rows to learn from and rows to measure; rows to learn from that (nearly)
repeat a row to measure of any task are taken out. `outside()` gives inputs that belong to no task.
"""

import ast
import bz2
import csv
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.data.split import leaks, normalise

# The ten domains of CLINC150, fifteen intents each (Larson et al. 2019, table of intents).
CLINC_DOMAINS = {
    "banking": "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate min_payment "
    "bill_balance transfer order_checks balance spending_history transactions report_fraud",
    "cards": "replacement_card_duration expiration_date damaged_card improve_credit_score report_lost_card "
    "card_declined credit_limit_change apr redeem_rewards credit_limit rewards_balance application_status "
    "credit_score new_card international_fees",
    "kitchen": "recipe restaurant_reviews calories nutrition_info restaurant_suggestion ingredients_list "
    "ingredient_substitution cook_time food_last meal_suggestion restaurant_reservation confirm_reservation how_busy "
    "cancel_reservation accept_reservations",
    "home": "shopping_list shopping_list_update next_song play_music update_playlist todo_list todo_list_update "
    "calendar calendar_update what_song order order_status reminder reminder_update smart_home",
    "auto": "traffic directions gas gas_type distance current_location mpg oil_change_when oil_change_how jump_start "
    "uber schedule_maintenance last_maintenance tire_pressure tire_change",
    "travel": "book_flight book_hotel car_rental travel_suggestion travel_alert travel_notification carry_on timezone "
    "vaccines translate flight_status international_visa lost_luggage plug_type exchange_rate",
    "utility": "time alarm share_location find_phone weather text spelling make_call timer date calculator "
    "measurement_conversion flip_coin roll_dice definition",
    "work": "direct_deposit pto_request taxes payday w2 pto_balance pto_request_status next_holiday insurance "
    "insurance_change schedule_meeting pto_used meeting_schedule rollover_401k income",
    "talk": "greeting goodbye tell_joke where_are_you_from how_old_are_you what_is_your_name who_made_you thank_you "
    "what_can_i_ask_you what_are_your_hobbies do_you_have_pets are_you_a_bot meaning_of_life who_do_you_work_for "
    "fun_fact",
    "meta": "change_ai_name change_user_name cancel user_name reset_settings whisper_mode repeat no yes maybe "
    "change_language change_accent change_volume change_speed sync_device",
}
DOGO = ("airline", "fastfood", "finance", "software")
# Intents that every domain of MultiDoGO has: nothing in "yes please" says whom it is for.
DOGO_COMMON = {"contentonly", "confirmation", "rejection", "openinggreeting", "closinggreeting", "thankyou",
               "outofdomain"}  # fmt: skip
Pair = tuple[str, str]  # prompt, completion


@dataclass(frozen=True)
class Task:
    """What one expert learns. `choices`: completions are labels, and quality is accuracy; else it is token-F1."""

    name: str
    train: list[Pair]
    test: list[Pair]
    choices: bool


def tasks(data: Path, train_rows: int, test_rows: int, names: list[str] | None = None) -> list[Task]:
    """All tasks, or those named, with at most so many rows each."""
    sources: dict[str, tuple[bool, Callable[[], Iterator[tuple[str, str, bool]]]]] = {
        "banking77": (True, lambda: _banking(data)),
        **{f"clinc-{d}": (True, lambda d=d: _clinc(data, d)) for d in CLINC_DOMAINS},
        **{f"dogo-{d}": (True, lambda d=d: _multidogo(data, d)) for d in DOGO},
        "gsm8k": (False, lambda: _gsm8k(data)),
        "sql": (False, lambda: _sql(data)),
        "tunes": (False, lambda: _tunes(data)),
        "shakespeare": (False, lambda: _shakespeare(data)),
        "code": (False, _code),
    }
    found = []
    for name in names or list(sources):
        choices, rows = sources[name]
        seen: dict[str, tuple[str, str, bool]] = {}
        for row in rows():
            seen.setdefault(normalise(row[0]) or row[0], row)
        train, test = ([(p, c) for p, c, t in seen.values() if t == wanted] for wanted in (False, True))
        rng = np.random.default_rng(0)
        test = [test[i] for i in rng.permutation(len(test))[:test_rows]]
        train = [train[i] for i in rng.permutation(len(train))[: train_rows + train_rows // 4]]
        found.append(Task(name, train, test, choices))
    measured = [p for t in found for p, _ in t.test]
    cleaned = []
    for t in found:
        leaked = set(leaks([p for p, _ in t.train], measured))
        kept = [row for i, row in enumerate(t.train) if i not in leaked][:train_rows]
        cleaned.append(Task(t.name, kept, t.test, t.choices))
    return cleaned


def outside(data: Path) -> list[str]:
    """The out-of-scope questions of CLINC150's test split."""
    return [text for text, _ in _clinc_file(data)["oos_test"]]


def _banking(data: Path) -> Iterator[tuple[str, str, bool]]:
    for part in ("train", "test"):
        with (data / f"banking77/{part}.csv").open(newline="") as f:
            for row in csv.DictReader(f):
                yield row["text"], row["category"], part == "test"


def _clinc_file(data: Path) -> dict[str, list[list[str]]]:
    return json.loads((data / "clinc150/data_full.json").read_text())


def _clinc(data: Path, domain: str) -> Iterator[tuple[str, str, bool]]:
    intents = set(CLINC_DOMAINS[domain].split())
    for part in ("train", "test"):
        for text, intent in _clinc_file(data)[part]:
            if intent in intents:
                yield text, intent, part == "test"


def _multidogo(data: Path, domain: str) -> Iterator[tuple[str, str, bool]]:
    for part in ("train", "test"):
        with (data / f"multidogo/{domain}/{part}.tsv").open(newline="") as f:
            for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
                intent, text = row["intent"] or "", row["utterance"] or ""
                if re.fullmatch(r"[a-z]+", intent) and intent not in DOGO_COMMON and len(text.split()) > 2:
                    yield text, intent, part == "test"


def _gsm8k(data: Path) -> Iterator[tuple[str, str, bool]]:
    for part in ("train", "test"):
        for line in (data / f"gsm8k/{part}.jsonl").read_text().splitlines():
            row = json.loads(line)
            yield row["question"], re.sub(r"<<.*?>>", "", row["answer"]), part == "test"


def _sql(data: Path) -> Iterator[tuple[str, str, bool]]:
    """GeoQuery whole, and as many questions of WikiSQL."""
    rng = np.random.default_rng(0)
    geography = json.loads((data / "text2sql/geography.json").read_text())
    wiki = json.loads(bz2.decompress((data / "text2sql/wikisql.json.bz2").read_bytes()))
    for entry in [*geography, *(wiki[i] for i in rng.permutation(len(wiki))[:1500])]:
        for sentence in entry["sentences"]:
            text, query = sentence["text"], min(entry["sql"], key=len)
            for name, value in sentence["variables"].items():
                text, query = text.replace(name, value), query.replace(name, value)
            yield text, query, sentence["question-split"] == "test"


def _tunes(data: Path) -> Iterator[tuple[str, str, bool]]:
    """Head and first line of a folk tune; the next line is to be written."""
    for file in sorted((data / "nottingham").glob("*.abc")):
        for n, tune in enumerate(re.split(r"\n\s*\n(?=X:)", file.read_text(errors="replace"))):
            lines = [x.strip() for x in tune.splitlines() if x.strip() and not x.startswith(("%", "S:"))]
            body = next((i for i, x in enumerate(lines) if not re.match(r"[A-Za-z]:", x)), len(lines))
            music = [x for x in lines[body:] if not re.match(r"[A-Za-z]:", x)]
            if len(music) >= 2:
                yield "\n".join([*lines[1:body], music[0]]), music[1], n % 5 == 0


def _shakespeare(data: Path) -> Iterator[tuple[str, str, bool]]:
    """Four lines of a play; the next two are to be written. The last tenth of the text is measured on."""
    lines = [x for x in (data / "tinyshakespeare/input.txt").read_text().splitlines() if x.strip()]
    for i in range(0, len(lines) - 6, 6):
        yield "\n".join(lines[i : i + 4]), "\n".join(lines[i + 4 : i + 6]), i > 0.9 * len(lines)


def _code() -> Iterator[tuple[str, str, bool]]:
    """First paragraph of a function's docstring, and the function, from Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for n, file in enumerate(sorted(f for f in root.rglob("*.py") if not {"site-packages", "test"} & set(f.parts))):
        try:
            text = file.read_text()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (about := ast.get_docstring(node)):
                first, lines = about.split("\n\n")[0], len(node.body) and (node.end_lineno or 0) - node.lineno
                if len(first.split()) >= 6 and lines <= 30:
                    yield (
                        first,
                        ast.unparse(ast.FunctionDef(**{**vars(node), "body": node.body[1:] or node.body})),
                        (n % 5 == 0),
                    )
