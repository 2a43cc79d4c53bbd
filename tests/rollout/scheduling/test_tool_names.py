"""Which tool an output calls, through real tokenizers: one that has the markers as tokens, one that has bytes alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rollout.scheduling import tool_names
from rollout.scheduling.latency import PERSON
from rollout.scheduling.tool_names import MARKERS, MOST_DECODED, THOUGHTS, UNKNOWN, ToolNames, command_name, label


class Counted:
    """A real tokenizer that counts the tokens it decodes."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.inner.decoder = decoders.ByteLevel()
        self.inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
        self.decoded = 0

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return self.inner.decode(ids)


SPECIAL = (*MARKERS, *(tag for pair in THOUGHTS for tag in pair))
TOKENIZERS = {"tokens": Counted(SPECIAL), "bytes": Counted(())}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Counted:
    return TOKENIZERS[request.param]


def called(tokenizer: Counted, text: str) -> str | None:
    return ToolNames(tokenizer).call(tokenizer.inner.encode(text).ids)


def hermes(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


MARKED = {
    "hermes": (hermes("search", query="tides"), "search"),
    "hermes, as our template writes it": ('<tool_call>{"name": "calc", "arguments": {"e": "1"}}</tool_call>', "calc"),
    "hermes, arguments first": (
        '<tool_call>{"arguments": {"name": "Bob", "n": 1}, "name": "greet"}</tool_call>',
        "greet",
    ),
    "hermes, escaped": ('<tool_call>{"name": "caf\\u00e9", "arguments": {}}</tool_call>', "café"),
    "hermes, cut behind the name": ('<tool_call>{"name": "search", "argu', "search"),
    "hermes, cut in the name": ('<tool_call>{"name": "sea', UNKNOWN),
    "hermes, nothing": ("<tool_call>", UNKNOWN),
    "hermes, prose": ("<tool_call>I shall search</tool_call>", UNKNOWN),
    "qwen xml": (
        "<tool_call>\n<function=read_file>\n<parameter=path>\nx\n</parameter></function></tool_call>",
        "read_file",
    ),
    "function alone": ('<function=spotify_trending>{"n": 5}</function>', "spotify_trending"),
    "glm": ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value></tool_call>", "get_weather"),
    "mistral": ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "add"),
    "mistral, several": ('[TOOL_CALLS][{"name": "b", "arguments": {}}, {"name": "a", "arguments": {}}]', "a+b"),
    "mistral, cut": ('[TOOL_CALLS][{"name": "b", "arguments": {"te', "b"),
    "mistral v11": ('[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]sub{"a": 1}', "add+sub"),
    "llama": ('<|python_tag|>{"name": "get_time", "parameters": {"zone": "UTC"}}', "get_time"),
    "llama, built in": ('<|python_tag|>brave_search.call(query="tides")', "brave_search.call"),
    "llama, bare": ('\n{"name": "get_time", "parameters": {"zone": "UTC"}}', "get_time"),
    "function object": ('{"function": {"name": "get_time"}, "arguments": {}}', "get_time"),
    "kimi": ("<|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>{}", "get_time"),
    "deepseek": ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{}", "get_time"),
    "deepseek 3.1": ("<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}", "get_time"),
    "minimax": ('<invoke name="get_time">\n<parameter name="zone">UTC', "get_time"),
    "gpt-oss": ("<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}", "get_time"),
    "several": (hermes("b") + "\n" + hermes("a") + hermes("b"), "a+b"),
    "more than three": ("".join(hermes(name) for name in "edcba"), "a+b+c"),
    "prose before": ("I shall look it up.\n" + hermes("search"), "search"),
    "a fence in the arguments": (hermes("write", text="```bash\nrm -r x\n```"), "write"),
    "another marker in the arguments": (hermes("write", text="<function=other>"), "write"),
}


@pytest.mark.parametrize("case", MARKED)
def test_marked_calls(tokenizer: Counted, case: str) -> None:
    text, name = MARKED[case]
    assert called(tokenizer, text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", None),
        ("The answer is 4.", None),
        ("[1] Smith et al.", None),
        ('{"name": "Bob", "age": 3}', None),
        ('{"a": ' * 3000, None),
        ("[" * 3000, None),
        ("<think>" + hermes("search") + "</think>It is high at six.", None),
        ("<think>" + hermes("search") + "</think>" + hermes("read"), "read"),
        (hermes("search") + "</think>" + hermes("read"), "read"),  # opened by the prompt
        (hermes("search") + "</think>Done.", None),
        ("<think>shall I " + hermes("search"), None),  # cut off while it thought
        ("[THINK]" + hermes("search") + "[/THINK]" + hermes("read"), "read"),
        (hermes("read") + "<think>well</think>", "read"),
        ("a<think>b</think>c<think>" + hermes("search") + "</think>" + hermes("read"), "read"),
        ("<think>```bash\nls\n```</think>Done.", None),
    ],
)
def test_answers_and_thoughts(tokenizer: Counted, text: str, name: str | None) -> None:
    assert called(tokenizer, text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("THOUGHT: look.\n\n```bash\ncd x && pytest -q\n```", "pytest"),
        ("```sh\nls\n```\n", "ls"),
        ("```shell\r\nls -l\r\n```", "ls"),
        ("```bash\nls", "ls"),  # the closing fence is a stop string
        ("First:\n```bash\nls\n```\nThat is it.", "ls"),
        ("```bash\nls\n```\nthen\n```bash\ngit diff\n```", "git+ls"),
        ("```bash\npip install x\n```\nthen\n```bash\nx --help\n```\nThis prints the help.", None),  # for a person
        ("```bash\n```", UNKNOWN),
        ("```python\nprint(1)\n```", None),
        ("Use `bash` or ```bash```.", None),
        ("```bash\ncat > f <<'EOF'\nit's pytest\nEOF\npytest\n```", "cat"),
    ],
)
def test_fenced_calls(tokenizer: Counted, text: str, name: str | None) -> None:
    assert called(tokenizer, text) == name


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("cd x && pytest -q", "pytest"),
        ("cd 'a b'&&pytest", "pytest"),
        ("cd x; ls | grep y", "ls"),
        ("cd x || exit 1\n# don't stop\npytest", "exit"),
        ("# it's a comment; really\ncd x  # go\npytest tests", "pytest"),
        ("set -e\nexport A=1 B=2\nsource .venv/bin/activate\npython x.py", "python"),
        ("A=1 B='2 3' pytest", "pytest"),
        ("A=$(date) make", "date"),
        ("sudo -u root timeout -k 5 60 pytest", "pytest"),
        ("timeout 300s env -i A=1 nice -n 5 ./run.sh", "run.sh"),
        ("timeout", None),
        ("uv run pytest", "pytest"),
        ("uv pip install x", "uv"),
        ("conda activate dev && pytest", "pytest"),
        ("python -m pytest -q", "pytest"),
        ("/usr/bin/python3.11 -W ignore -u -m pytest", "pytest"),
        ("python x.py -m pytest", "python"),
        ("python3 -c 'import x; x.y()'", "python"),
        ("python - <<'EOF'\nprint('a')\nEOF", "python"),
        ("python -m", "python"),
        ("bash -lc 'cd x && pytest'", "pytest"),
        ("bash -c \"bash -c 'bash -c ls'\"", "bash"),
        ("bash run.sh", "bash"),
        ("for f in *.py; do python $f; done", "python"),
        ("if [ -f x ]; then\n  make\nfi", "make"),
        ("(cd x && make) 2>&1 | tail -5", "make"),
        ("cd x 2>&1 && make", "make"),
        ("echo start; pytest", "pytest"),
        ("cd x", "cd"),
        ("echo 'all done'", "echo"),
        ("cd x && \\\n  pytest", "pytest"),
        ('cd x && pytest -k "unclosed', "pytest"),
        ('cd "unclosed && pytest', "cd"),
        ("", None),
        ("\n;;&&\n", None),
        ("A=1", None),
        ("./manage.py test", "manage.py"),
        ("/", "/"),
    ],
)
def test_the_command_that_matters(script: str, name: str | None) -> None:
    assert command_name(script) == name


def test_few_tokens_are_decoded_behind_a_marker_wherever_it_stands() -> None:
    tokenizer = Counted(SPECIAL)
    long = "word " * 4 * MOST_DECODED
    assert called(tokenizer, long + hermes("write", text=long)) == "write"
    assert tokenizer.decoded == tool_names.HEAD


@pytest.mark.parametrize("text", ["word " * 4 * MOST_DECODED, hermes("a") * 400, "<tool_call>?" * 4 * MOST_DECODED])
def test_what_is_decoded_is_bounded(text: str) -> None:
    for tokenizer in (Counted(SPECIAL), Counted(())):
        called(tokenizer, text)
        assert tokenizer.decoded <= MOST_DECODED


def test_few_tokens_are_decoded_where_no_token_starts_a_call() -> None:
    tokenizer = Counted(())
    most = tool_names.OPENING + tool_names.ENDING
    assert called(tokenizer, "word " * most) is None and tokenizer.decoded == most
    call = hermes("write", path="f")
    assert called(tokenizer, "word " * most + call) == called(tokenizer, call + "word " * most) == "write"


def test_a_long_block_is_known_by_its_beginning() -> None:
    block = "```bash\ncat > f <<'EOF'\n" + "word\n" * MOST_DECODED + "EOF\n```"
    assert called(TOKENIZERS["tokens"], block) == "cat"


def test_own_markers() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.inner.encode('CALL {"name": "x"}').ids
    assert ToolNames(tokenizer, markers=("CALL",)).call(ids) == "x"
    assert ToolNames(tokenizer).call(ids) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("search", "search"),
        (" a\nb\x00\u200b ", "ab"),
        ("x" * 100, "x" * 64),
        ("", UNKNOWN),
        ("\n\t", UNKNOWN),
        ("\ud800", UNKNOWN),
        (PERSON, "person()"),
        ("über", "über"),
    ],
)
def test_labels(name: str, expected: str) -> None:
    assert label(name) == expected


def test_what_a_tokenizer_raises_has_one_name() -> None:
    class Strange(Counted):
        def decode(self, ids: list[int]) -> str:
            raise OverflowError("id 9")

    with pytest.raises(tool_names.Undecodable, match="OverflowError: id 9"):
        called(Strange(SPECIAL), hermes("search"))


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL, "```bash\n", "```", '{"name": "', '"', "{", "[", "&&", "\n", "cd x", "'", "$(", "\\"]
        ),
        st.text(max_size=6),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(PIECES.map("".join))
def test_no_output_raises(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        name = called(tokenizer, text)
        assert name is None or (0 < len(name) <= 64 and name.isprintable() and name != PERSON)
    command_name(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 400), max_size=40))
def test_no_ids_raise(ids: list[int]) -> None:
    ToolNames(TOKENIZERS["tokens"]).call(ids)
