"""Chats: templates against transformers', what users type as text, thoughts, settings of the checkpoint, turns."""

import argparse
import json
import random
import shutil

import pytest
from conftest import CASES, CHAT_TEMPLATE, GEMMA4_SPECIAL, SIZES, TINY_GEMMA, copy_tiny_gemma, fake_input, small_model
from safetensors.torch import save_file

import chat
import generate as program
from sampling import Sampling
from scheduler import Scheduler
from text import completed, read_prompts, sampling_settings, split_thoughts, stops_within, thoughts_of
from tokenizer import ChatTemplate, JsonTokenizer, Tokenizer, read_template

SYSTEM = {"role": "system", "content": " Be brief.\n"}
HI, MORE = {"role": "user", "content": "  Hi!\n\n\n"}, {"role": "user", "content": "\n\nAnd now? 😀\n"}
ANSWER = {"role": "assistant", "content": "Hello.\n\nIt is  five.\n"}
THOUGHTFUL = {"role": "assistant", "content": "<|channel>thought\nHm.\n\nSo<channel|>\n Hello. "}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(from_json):
    return from_json


def rendered(reference, messages: list[dict], **options) -> list[int]:
    return reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


# --- tokens of a chat


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [HI],
        [SYSTEM, HI],
        [SYSTEM | {"role": "developer"}, HI],
        [HI, ANSWER, MORE],
        [SYSTEM, HI, ANSWER, MORE, THOUGHTFUL, HI],
        [HI, {"role": "assistant", "content": "<|channel>thought\ncut"}, MORE],
        user("a\n\n\n\nb  é 漢字 😀 <table> def f(x):\n    return x"),
    ],
)
def test_chats_are_transformers(tokenizer, transformers_tokenizer, messages, thinking):
    expected = rendered(transformers_tokenizer, messages, enable_thinking=thinking)
    assert tokenizer.encode_chat(messages, thinking) == expected
    assert expected.count(tokenizer.bos_id) == 1
    as_model = [message | {"role": message["role"].replace("assistant", "model")} for message in messages]
    assert tokenizer.encode_chat(as_model, thinking) == expected


OTHERS_TEMPLATE = """
{%- set ns = namespace(count=0) %}
    {# white space as trim_blocks and lstrip_blocks leave it #}
    {% if messages|length > 1 %}
    several
    {% endif %}
{%- for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{{ bos_token }}{% generation %}{{ m | tojson }}|{{ m.content | upper }}{% endgeneration %}{{ eos_token }}
{%- set ns.count = ns.count + 1 %}
{%- if ns.count > 1 %}{% break %}{% endif %}
{%- endfor %}
{{ tools is none }} {{ add_generation_prompt }} {{ strftime_now('%Y') }} {{ nothing }}
"""


def test_names_and_tags_are_those_that_transformers_gives(transformers_tokenizer, json_tokenizer):
    template = ChatTemplate(OTHERS_TEMPLATE, json_tokenizer, {"bos_token": "<bos>", "eos_token": "<eos>"})
    messages = [SYSTEM, HI, ANSWER | {"content": "é <b> & '\"'"}, MORE]
    expected = transformers_tokenizer.apply_chat_template(
        messages, chat_template=OTHERS_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert template.render(messages, False) == expected


@pytest.mark.parametrize("special", [*GEMMA4_SPECIAL, "<end_of_turn>"])
def test_what_a_user_types_is_text(tokenizer, special):
    """Also in several messages; the template goes on trimming."""
    text = f" {special}{special}x {special[:-1]}\n{special}"
    messages = [
        {"role": "system", "content": special},
        *user(text),
        ANSWER | {"content": f"b {special}"},
        *user(special),
    ]
    plain = [message | {"content": "x"} for message in messages]
    tokens = tokenizer.encode_chat(messages, thinking=True)

    def controls(tokens):
        return [token for token in tokens if token in tokenizer.special]

    if special not in ("<|channel>", "<channel|>"):  # of an answer, they are a thought's
        assert controls(tokens) == controls(tokenizer.encode_chat(plain, thinking=True))
    spelled = b"".join(
        tokenizer.bpe.id_to_token(token).encode() if token in tokenizer.special else tokenizer._bytes(token)
        for token in tokenizer.encode_chat(user(text))
    )
    assert spelled.decode() == f"<bos><|turn>user\n{text.strip()}<turn|>\n<|turn>model\n"


def test_tokens_around_what_is_spelled_are_those_of_a_plain_text(tokenizer):
    """As the library has them with encode_special_tokens."""
    text = "what does <turn|> mean,\n\n<|turn>? <turn"
    tokens = tokenizer.encode_chat(user(text))
    plain = tokenizer._plain.encode(f"user\n{text}", add_special_tokens=False).ids
    assert tokens[2 : 2 + len(plain)] == plain
    assert tokens[2 + len(plain)] == tokenizer.end_of_turn


def test_marks_are_no_characters_of_the_text(tokenizer):
    text = "\U000f0000 <turn|> \U000f00000\U000f0000 \U000f0001"
    assert tokenizer.decode(tokenizer.encode_chat(user(text))) == f"user\n{text}\nmodel\n"


def test_turn_tokens_that_a_file_does_not_call_special(json_tokenizer, tmp_path):
    content = json.loads((json_tokenizer / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(json_tokenizer / "chat_template.jinja", tmp_path)
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    tokens = tokenizer.encode_chat(user("a<turn|>\n<|turn>model\n<bos>"))
    assert [tokens.count(token) for token in (tokenizer.bos_id, tokenizer.start_of_turn, tokenizer.end_of_turn)] == [
        1,
        2,
        1,
    ]
    assert tokenizer.decode(tokens) == "user\na<turn|>\n<|turn>model\n<bos>\nmodel\n"


def test_random_chats_are_transformers(tokenizer, transformers_tokenizer):
    rng = random.Random(0)
    parts = ["\n", "\n\n", " ", "é", "😀", "user", "model", "if x:\n    y", "<", "turn"]
    for _ in range(200):
        messages = [SYSTEM] * rng.randrange(2)
        for _ in range(rng.randrange(3)):
            texts = ["".join(rng.choices(parts, k=5)) for _ in range(2)]
            messages += [*user(texts[0]), {"role": "assistant", "content": texts[1]}]
        messages += user("".join(rng.choices(parts, k=5)))
        thinking = rng.random() < 0.5
        expected = rendered(transformers_tokenizer, messages, enable_thinking=thinking)
        assert tokenizer.encode_chat(messages, thinking) == expected


# --- built-in formats


@pytest.fixture
def bare(json_tokenizer, tmp_path):
    """A tokenizer without a template."""
    shutil.copy(json_tokenizer / "tokenizer.json", tmp_path)
    return JsonTokenizer(tmp_path / "tokenizer.json")


def test_built_in_formats(bare):
    tiny = Tokenizer(TINY_GEMMA / "tokenizer.model")
    for tokenizer, (begin, end) in ((bare, ("<|turn>", "<turn|>")), (tiny, ("<start_of_turn>", "<end_of_turn>"))):
        text = f"{begin}user\nBe brief.\n\nHi!{end}\n{begin}model\nHello.\n\nIt is  five.{end}\n"
        text += f"{begin}user\nAnd now? 😀{end}\n{begin}model\n"
        assert tokenizer.encode_chat([SYSTEM, HI, ANSWER, MORE]) == tokenizer.encode(text)
        assert tokenizer.encode_chat([HI]) == tokenizer.encode_turn(HI["content"])
        for messages in ([HI, SYSTEM, MORE], [ANSWER, MORE]):
            with pytest.raises(ValueError, match="a system message must be the first"):
                tokenizer.encode_chat(messages)
        with pytest.raises(ValueError, match="doesn't think on request"):
            tokenizer.encode_chat([HI], thinking=True)


def test_a_template_with_sentencepiece(tmp_path):
    """The control tokens of SentencePiece are none in a text; in a template they are."""
    shutil.copy(TINY_GEMMA / "tokenizer.model", tmp_path)
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    )
    (tmp_path / "chat_template.jinja").write_text(template + "{% endfor %}<start_of_turn>model{{ '\n' }}")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.encode_chat([HI]) == Tokenizer(TINY_GEMMA / "tokenizer.model").encode_chat([HI])
    tokens = tokenizer.encode_chat(user("<bos><end_of_turn> <eos>"))
    assert tokenizer.decode(tokens) == (
        "<start_of_turn>user\n<bos><end_of_turn> <eos><end_of_turn>\n<start_of_turn>model\n"
    )
    assert [tokens.count(token) for token in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_turn)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list"),
        ("Hi", "messages must be a list"),
        (["Hi"], "message 1 must be an object"),
        ([{"role": "user"}], "message 1 must be an object"),
        ([HI | {"name": "x"}], "'role' and 'content' alone"),
        ([HI, {"role": "tool", "content": "x"}], "message 2 has the role 'tool'; known are system"),
        ([{"role": ["user"], "content": "x"}], "message 1 has the role"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "the content of message 1 must be a str"),
        ([{"role": "user", "content": "\ud800"}], "the content of message 1 is not UTF-8"),
        ([HI, ANSWER], "the last message must be the user's"),
    ],
)
def test_what_are_no_messages_is_refused(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat(messages)


# --- templates


def test_where_templates_are(tmp_path):
    assert read_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"bos_token": {"content": "<b>"}, "boi_token": "<i>", "add_bos_token": True}))
    assert read_template(tmp_path) is None
    several = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}2{{ boi_token }}"},
    ]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": several}))
    assert read_template(tmp_path).render([HI], False) == "<b>2<i>"
    settings.write_text(json.dumps({"chat_template": "{{ bos_token }}3{{ eos_token }}"}))
    assert read_template(tmp_path).render([HI], False) == "<bos>3<eos>"
    (tmp_path / "chat_template.jinja").write_text("4")
    assert read_template(tmp_path).render([HI], False) == "4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is cut or damaged: not valid JSON"),
        ("tokenizer_config.json", '{"chat_template": 5}', r"tokenizer_config\.json: chat_template must be a text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag"}]}', "with one named 'default'"),
        ("chat_template.jinja", "\udcff", r"chat_template\.jinja is not UTF-8"),
        ("chat_template.jinja", " " * 2**21, "it is no chat template"),
        ("chat_template.jinja", "{% if %}", r"template in .*chat_template\.jinja fails: Expected an expression"),
        ("chat_template.jinja", "{{ messages[0].nothing.more }}", "fails: .* has no attribute 'nothing'"),
        ("chat_template.jinja", "{{ raise_exception('no system here') }}", "fails: no system here$"),
        ("chat_template.jinja", "{{ 1 / 0 }}", "fails: division by zero"),
        ("chat_template.jinja", "{% include '/etc/passwd' %}", "fails: "),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__' .* is unsafe"),
        ("chat_template.jinja", "{{ raise_exception.__globals__.os }}", "fails: access to attribute '__globals__'"),
        ("chat_template.jinja", "{{ messages.append(1) }}", "fails: access to attribute 'append' .* is unsafe"),
        ("chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}", "fails: Range too big"),
        ("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion depth"),
    ],
)
def test_a_template_that_fails_is_one_line(capsys, json_tokenizer, tmp_path, name, content, message):
    shutil.copy(json_tokenizer / "tokenizer.json", tmp_path)
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("x")  # without a chat it is nobody's matter
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat([HI])


# --- thoughts


def test_thoughts_are_told_from_the_answer(tokenizer):
    for text, thoughts, answer in (
        ("yes", "", "yes"),
        ("<|channel>thought\nHm.\n\nSo\n<channel|>yes", "Hm.\n\nSo", "yes"),
        ("<|channel>thought\n<channel|>yes", "", "yes"),
        ("<|channel>thought<channel|>yes", "", "yes"),
        ("<|channel>thought\ncut", "cut", ""),
        ("a<|channel>thought\n1<channel|>b<|channel>thought\n2<channel|>c", "1\n\n2", "abc"),
        ("late<channel|>r", "", "later"),
    ):
        tokens = tokenizer.encode(text, bos=False)
        assert thoughts_of(tokenizer, tokens) == thoughts
        assert completed(tokenizer, [*tokens, tokenizer.end_of_turn], (tokenizer.end_of_turn,), []) == (answer, True)
    tiny = Tokenizer(TINY_GEMMA / "tokenizer.model")
    assert split_thoughts(tiny, [5, 6, 7]) == ([], [5, 6, 7])


def test_stop_strings_are_those_of_the_answer(tokenizer):
    tokens = tokenizer.encode("<|channel>thought\none stop two<channel|>three stop four", bos=False)
    is_there = stops_within(tokenizer, ["stop", "two three", "twothree"])
    first = next(count for count in range(1, len(tokens)) if is_there(tokens[:count]))
    assert tokenizer.decode(tokens[:first]).endswith("three stop")
    assert completed(tokenizer, tokens[:first], (), ["stop"]) == ("three ", True)


@pytest.mark.parametrize("shown", [True, False])
def test_thoughts_stream_to_stderr(capsys, tokenizer, shown):
    text = "<|channel>thought\nHm stop é\n\nSo<channel|>a 😀 b<|channel>thought\n<channel|> stop c"
    for stops, answer in (([], "a 😀 b stop c\n"), (["stop"], "a 😀 b \n")):
        printer = chat.Printer(tokenizer, (tokenizer.end_of_turn,), stops, shown)
        for token in [*tokenizer.encode(text, bos=False), tokenizer.end_of_turn]:
            printer(token)
        printer.end()
        assert capsys.readouterr() == (answer, "Hm stop é\n\nSo\n" if shown else "")
    printer = chat.Printer(tokenizer, (tokenizer.end_of_turn,), [], shown)
    for token in tokenizer.encode("<|channel>thought\ncut", bos=False):
        printer(token)
    printer.end()
    assert capsys.readouterr() == ("\n", "cut\n" if shown else "")


# --- the program


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    monkeypatch.setattr("cli.copy_bandwidth", lambda device: 1e10)


def save_chat_checkpoint(directory, json_tokenizer, case: str, **settings):
    """A small random model of a case with the small tokenizer.json, as a checkpoint of ours."""
    shutil.copytree(json_tokenizer, directory, dirs_exist_ok=True)
    model_type, own = CASES[case]
    config = SIZES | own | {"model_type": model_type, "vocab_size": 640, "max_position_embeddings": 1024} | settings
    (directory / "config.json").write_text(json.dumps(config))
    metadata = {"format": "gemma-fast", "format_version": "1", "weight_format": "fp32"}
    model = small_model(case=case, vocab_size=640, **settings)
    save_file(model.state_dict(), directory / "gemma.safetensors", metadata)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, json_tokenizer):
    return save_chat_checkpoint(tmp_path_factory.mktemp("chat"), json_tokenizer, "gemma3-window-half")


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "chat")


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = program.main([*map(str, arguments), "--device", "cpu", "--precision", "fp32"])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_end_of_a_turn_stops(checkpoint, tokenizer):
    """Whether or not generation_config.json knows."""
    model, loaded = program.load_model(checkpoint, device="cpu", precision="fp32")
    assert model.config.stop_ids == (1, tokenizer.end_of_turn)
    assert loaded.end_of_turn == tokenizer.end_of_turn


def test_chat_system_and_thinking_are_in_the_prompt(capsys, checkpoint, tokenizer, monkeypatch):
    prompts = []

    def record(model, texts, limits, **options):
        prompts.extend(texts)
        return [[5, tokenizer.end_of_turn]] * len(texts)

    monkeypatch.setattr(program, "generate", record)
    options = ("--checkpoint_path", checkpoint, "--prompt", "Hi <turn|>!", "--json")
    for more, messages, thinking in (
        ((), None, False),
        (("--chat",), user("Hi <turn|>!"), False),
        (("--chat", "--system", " Be brief.\n"), [SYSTEM, *user("Hi <turn|>!")], False),
        (("--chat", "--thinking"), user("Hi <turn|>!"), True),
        (("--chat", "--thinking", "--system", " Be brief.\n"), [SYSTEM, *user("Hi <turn|>!")], True),
    ):
        status, _, err = run(capsys, *options, *more)
        assert status == 0, err
        plain = tokenizer.encode("Hi <turn|>!")
        assert prompts.pop() == (plain if messages is None else tokenizer.encode_chat(messages, thinking))


def test_messages_of_a_prompts_file(capsys, checkpoint, tokenizer, tmp_path):
    lines = [
        {"messages": [HI, ANSWER, MORE], "id": 1, "num_samples": 2},
        {"messages": [SYSTEM, HI], "temperature": 0},
        {"prompt": "plain"},
    ]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ("--checkpoint_path", checkpoint, "--max_new_tokens", 4, "--seed", 1, "--system", "Be kind.")
    status, out, err = run(capsys, "--prompts_file", file, *options, "--json")
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    kind = {"role": "system", "content": "Be kind."}
    chats = [[kind, HI, ANSWER, MORE]] * 2 + [[SYSTEM, HI]]
    for completion, line, messages in zip(found, (lines[0], lines[0], lines[1]), chats):
        assert completion["messages"] == line["messages"] and "prompt" not in completion
        assert completion["prompt_tokens"] == len(tokenizer.encode_chat(messages))
    assert found[3]["prompt_tokens"] == len(tokenizer.encode("plain"))
    output = tmp_path / "out.jsonl"
    assert run(capsys, "--prompts_file", file, *options, "--output", output)[0] == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == found
    status, out, _ = run(capsys, "--prompts_file", file, *options)
    assert [part.partition("\n")[0] for part in out.split("--- prompt ")[1:]] == [
        "1, sample 1",
        "1, sample 2",
        "2",
        "3",
    ]
    assert "Hi!" not in out and "3\nplain" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [HI], "prompt": "a"}, "line 2: 'prompt' and 'messages' are both there"),
        ({"messages": []}, "line 2: messages must be a list"),
        ({"messages": [HI, ANSWER]}, "line 2: the last message must be the user's"),
        ({"messages": [HI], "tools": []}, "line 2: unknown 'tools'"),
        ({"id": 3}, "line 2: not a JSON object with a string 'prompt', or with 'messages'"),
    ],
)
def test_bad_messages_are_numbered(tmp_path, line, message):
    file = tmp_path / "prompts.txt"
    file.write_text(json.dumps({"messages": [HI]}) + "\n" + json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_a_line_that_the_template_refuses_is_named(capsys, checkpoint, tmp_path):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"messages": [HI, SYSTEM, MORE], "id": "bad"}, {"messages": [HI], "id": "good"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ("--checkpoint_path", checkpoint, "--prompts_file", file, "--max_new_tokens", 2)
    status, _, err = run(capsys, *options)
    assert status == 2 and "prompts.jsonl, line 1: the chat template in " in err
    assert err.splitlines()[-1].endswith("fails: a system message in the middle")
    assert run(capsys, *options, "--output", output)[0] == 0
    bad, good = map(json.loads, output.read_text().splitlines())
    assert "system message in the middle" in bad["error"] and "text" in good


@pytest.fixture
def thinks(monkeypatch, tokenizer):
    """Whatever is asked, there are thoughts in the answer."""
    tokens = [*tokenizer.encode("<|channel>thought\nHm.\nSo<channel|>Five.", bos=False), tokenizer.end_of_turn]

    def answer(model, texts, limits, num_samples, on_completion=None, stats=None, **options):
        for i, count in enumerate(num_samples):
            for j in range(count):
                if on_completion is not None:
                    on_completion(i, j, tokens)
        return [tokens] * sum(num_samples)

    monkeypatch.setattr(program, "generate", answer)
    return tokens


def test_thoughts_are_apart(capsys, checkpoint, tmp_path, thinks):
    options = ("--checkpoint_path", checkpoint, "--chat", "--thinking", "--prompt", "What time is it?")
    status, out, err = run(capsys, *options)
    assert (status, out) == (0, "Five.\n") and err.startswith("Hm.\nSo\n")
    status, out, err = run(capsys, *options, "--no_thoughts")
    assert (status, out) == (0, "Five.\n") and "Hm." not in err
    _, out, err = run(capsys, *options, "--num_samples", 2)
    assert out == "--- prompt 1, sample 1\nFive.\n--- prompt 1, sample 2\nFive.\n"
    assert err.startswith("--- prompt 1, sample 1\nHm.\nSo\n--- prompt 1, sample 2\nHm.\nSo\n")
    _, out, err = run(capsys, *options, "--json")
    completion = json.loads(out)
    assert (completion["text"], completion["thoughts"], completion["tokens"]) == ("Five.", "Hm.\nSo", thinks)
    assert completion["finish_reason"] == "stop" and "Hm." not in err
    _, out, _ = run(capsys, *options, "--json", "--no_thoughts")
    assert "thoughts" not in json.loads(out)
    run(capsys, *options, "--output", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == completion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--thinking"], "--thinking needs --chat or --interactive, or 'messages' in a prompts file"),
        (["--system", "x"], "--system needs --chat or --interactive"),
        (["--system", ""], "--system needs --chat or --interactive"),
        (["--chat", "--system", "\udcff"], "--system is not UTF-8"),
        (["--chat", "--thinking"], "doesn't think on request: it has no chat template with enable_thinking"),
        (["--interactive", "--thinking"], "doesn't think on request"),
    ],
)
def test_mistakes_of_a_chat_are_one_line(capsys, options, message):
    """With tiny-gemma, which has no template."""
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "")
    *notes, last = err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert last.startswith("error: ") and message in last


def test_thinking_with_a_template_that_does_not_know_of_it(capsys, copied):
    (copied / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("enable_thinking", "false"))
    options = ("--checkpoint_path", copied, "--chat", "--max_new_tokens", 2)
    assert run(capsys, *options)[0] == 0
    status, _, err = run(capsys, *options, "--thinking")
    assert status == 2 and "no chat template with enable_thinking" in err


def test_a_tokenizer_of_another_model_is_one_line(capsys, copied):
    content = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(content | {"vocab_size": 500}))
    for file in copied.glob("*.safetensors"):
        file.unlink()
    model = small_model(case="gemma3-window-half", vocab_size=500)
    metadata = {"format": "gemma-fast", "format_version": "1", "weight_format": "fp32"}
    save_file(model.state_dict(), copied / "gemma.safetensors", metadata)
    status, out, err = run(capsys, "--checkpoint_path", copied)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith(
        "tokenizer.json is of another model: it has 640 tokens, the embedding has 500 rows"
    )


# --- settings of generation_config.json


def test_settings_of_the_checkpoint(tmp_path):
    file = tmp_path / "generation_config.json"
    assert sampling_settings(tmp_path) == {}
    for content, settings in (
        (
            {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
            dict(temperature=1.0, top_k=64, top_p=0.95),
        ),
        ({"top_k": None, "top_p": 0.5, "max_length": 20}, dict(top_p=0.5)),
        ({"do_sample": False, "top_k": "many"}, {}),
    ):
        file.write_text(json.dumps(content))
        assert sampling_settings(tmp_path) == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"temperature": "hot"}', "generation_config.json: temperature must be a number, at least 0, not 'hot'"),
        ('{"top_k": 1.5}', "generation_config.json: top_k must be a whole number"),
        ('{"top_p": 0}', "generation_config.json: top_p must be a number above 0"),
        ('{"repetition_penalty": true}', "generation_config.json: repetition_penalty must be"),
        ("[1]", "generation_config.json"),
        ("{", "generation_config.json is cut or damaged"),
    ],
)
def test_bad_settings_of_the_checkpoint_are_one_line(capsys, tmp_path, content, message):
    copy_tiny_gemma(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    status, out, err = run(capsys, "--checkpoint_path", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_flag_and_a_line_win_over_the_checkpoint(capsys, copied, monkeypatch, tmp_path):
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 9, 4]}
    settings |= {"suppress_tokens": [12, 10]}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    used = []

    def record(model, texts, limits, sampling, **options):
        used.extend(sampling)
        return [[5]] * len(texts)

    monkeypatch.setattr(program, "generate", record)
    options = ("--checkpoint_path", copied, "--json")
    _, _, err = run(capsys, *options)
    assert used.pop() == Sampling(temperature=1.0, top_k=64, top_p=0.95)
    line = "temperature 1.0, top_k 64, top_p 0.95 (temperature, top_k, top_p: generation_config.json's)"
    assert f"{line}; stop ids 1, 9, 4; suppressed ids 12, 10\n" in err
    _, _, err = run(capsys, *options, "--top_k", 0, "--min_p", 0.1)
    assert used.pop() == Sampling(temperature=1.0, top_k=0, top_p=0.95, min_p=0.1)
    assert "temperature 1.0, top_p 0.95, min_p 0.1 (temperature, top_p: generation_config.json's); stop" in err
    _, _, err = run(capsys, *options, "--temperature", 0)
    assert used.pop() == Sampling(temperature=0, top_k=64, top_p=0.95)
    assert "greedy; stop ids" in err
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a", "top_p": 0.5}))
    run(capsys, *options, "--prompts_file", file)
    assert used.pop() == Sampling(temperature=1.0, top_k=64, top_p=0.5)


def test_without_settings_of_the_checkpoint_ours_are_used(capsys):
    _, _, err = run(capsys, "--max_new_tokens", 2)
    assert "temperature 0.8, top_k 200; stop ids 1, 5\n" in err
    _, _, err = run(capsys, "--max_new_tokens", 2, "--num_beams", 2)
    assert "2 beams; stop ids 1, 5\n" in err


# --- conversations


class Conversation:
    """Stands for the Scheduler: records prompts and what of them is cached, and has an answer to each."""

    answers, prompts = [], []

    def __init__(self, runner, model, requests, rows, check, pace):
        (self.request,) = requests

    def run(self, on_step, on_token, cached, held):
        tokens = self.answers[len(self.prompts)]
        self.prompts.append((self.request.prompt, cached))
        for token in tokens:
            on_token(token)
        yield self.request, tokens


def converse(monkeypatch, capsys, checkpoint, tokenizer, answers: list[str], *options):
    """Prompts and cached tokens of a conversation whose answers are given; stdout and stderr."""
    end = [tokenizer.end_of_turn]
    monkeypatch.setattr(Conversation, "answers", [tokenizer.encode(text, bos=False) + end for text in answers])
    monkeypatch.setattr(Conversation, "prompts", [])
    monkeypatch.setattr(chat, "Scheduler", Conversation)
    fake_input(monkeypatch, [f"question {i}" for i in range(len(answers))])
    status, out, err = run(capsys, "--checkpoint_path", checkpoint, "--interactive", *options)
    assert status == 0, err
    return Conversation.prompts, out, err


ANSWERS = ["<|channel>thought\nHm.<channel|>Five.", "Six\n\nx", "Seven <turn", "."]


def test_later_turns_have_no_thoughts(monkeypatch, capsys, checkpoint, tokenizer):
    options = ("--thinking", "--system", "Be brief.", "--max_new_tokens", "8")
    prompts, out, err = converse(monkeypatch, capsys, checkpoint, tokenizer, ANSWERS, *options)
    assert out == "Five.\nSix\n\nx\nSeven <turn\n.\n" and err.endswith("Hm.\n")
    messages = [SYSTEM]
    for i, (prompt, _) in enumerate(prompts):
        messages = [*messages, *user(f"question {i}")]
        assert prompt == tokenizer.encode_chat(messages, thinking=True)
        messages = [*messages, {"role": "assistant", "content": ANSWERS[i].rpartition("<channel|>")[2]}]
    _, _, err = converse(monkeypatch, capsys, checkpoint, tokenizer, ANSWERS, *options, "--no_thoughts")
    assert "Hm." not in err


def test_what_a_turn_reuses(monkeypatch, capsys, checkpoint, json_tokenizer, tokenizer, tmp_path):
    """The common beginning; with rings all that is cached, or nothing, once they are closed."""
    options = ("--thinking", "--max_new_tokens", "8")
    for case in ("gemma3-window-half", "gemma-gqa"):
        directory = save_chat_checkpoint(tmp_path / case, json_tokenizer, case)
        prompts, _, _ = converse(monkeypatch, capsys, directory, tokenizer, ANSWERS, *options)
        kept, window = [], 20 if case == "gemma3-window-half" else None
        counts = []
        for (prompt, cached), text in zip(prompts, ANSWERS):
            common = next(i for i, (a, b) in enumerate(zip([*kept, None], prompt)) if a != b)
            expected = common if window is None or common == len(kept) or len(kept) + 2 <= window else 0
            assert cached == expected < len(prompt)
            counts.append((cached, len(kept)))
            kept = prompt + tokenizer.encode(text, bos=False)
        (first, _), (second, after_a_thought), *later = counts
        assert first == 0 and second < after_a_thought
        assert (second == 0) == (window is not None)
        assert [cached for cached, _ in later] == [count for _, count in later]


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gemma3-window-half", {"sliding_window": 64}),
        ("gemma3-window-small", {}),
        ("gemma4-shared", {"vocab_size_per_layer_input": 640}),
    ],
)
def test_a_turn_that_reuses_is_as_one_that_does_not(monkeypatch, capsys, json_tokenizer, tmp_path, case, settings):
    """Answers of a random model, whose tokens are no tokenizer's: the beginning in common may end anywhere. A ring that
    is no larger than its window has nothing to go back to."""
    directory = save_chat_checkpoint(tmp_path, json_tokenizer, case, **settings)
    turns = []

    class Recorded(Scheduler):
        def run(self, on_step, on_token, cached, held):
            for request, tokens in super().run(on_token=on_token, cached=cached, held=held):
                turns.append((request.prompt, cached, list(tokens)))
                yield request, tokens

    monkeypatch.setattr(chat, "Scheduler", Recorded)
    fake_input(monkeypatch, ["a", "hello there", "x " * 30, *"bcdefg"])
    options = ["--temperature", "0", "--max_new_tokens", "14", "--thinking"]
    status, _, err = run(capsys, "--checkpoint_path", directory, "--interactive", *options)
    assert status == 0, err
    assert len(turns) == 9
    model, _ = program.load_model(directory, device="cpu", precision="fp32")
    monkeypatch.undo()
    for prompt, _, tokens in turns:
        (expected,) = program.generate(model, [prompt], 14, temperature=0, prefix_cache=False)
        assert tokens == expected
    if case == "gemma-gqa":
        assert all(cached for _, cached, _ in turns[1:])


def test_a_conversation_with_a_template_that_fills_the_context_starts_anew(monkeypatch, capsys, checkpoint, tokenizer):
    monkeypatch.setattr(chat, "CHAT_LENGTH", 80)
    options = ("--max_new_tokens", "8", "--system", "Be brief.")
    prompts, _, err = converse(monkeypatch, capsys, checkpoint, tokenizer, ["Yes."] * 9, *options)
    assert "note: the conversation has filled its 80 tokens and starts anew" in err
    anew = [i for i in range(1, 9) if prompts[i][0] == tokenizer.encode_chat([SYSTEM, *user(f"question {i}")])]
    assert anew and all(len(prompts[i][0]) < len(prompts[i - 1][0]) for i in anew)


def test_settings_are_named_in_the_run(checkpoint, tmp_path):
    """A run with another system is another run to --output, and one without any is as before."""
    arguments = ["--checkpoint_path", str(checkpoint), "--prompt", "a", "--chat", "--output", str(tmp_path / "out")]
    digests = set()
    for more in ([], ["--system", "x"], ["--system", "y"], ["--thinking"], ["--no_thoughts"]):
        args = program.program_parser().parse_args([*arguments, *more])
        output, _, _ = program._output(args, program._asked(args, Sampling()), {})
        digests.add(output.head["run"])
        output.stream.close()
    assert len(digests) == 5
    assert isinstance(args, argparse.Namespace)
