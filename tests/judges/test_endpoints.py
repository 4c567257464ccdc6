"""What DeepSeek, vLLM, llama.cpp's server and Ollama answer, as far as they differ, and judges that think or will not grade."""

import json

import pytest
from api_server import Reply, serve, split, verdict

from refusal.io.endpoint import Endpoint
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.judges.llm import LLMJudge

ONE = ["Do x."], ["Sure, here is how to open the bakery door."]
GOOD, BAD = verdict(1, 1), verdict(0, 0)
LIMIT = "This model's maximum context length is 2048 tokens. However, you requested 2723 tokens."
USAGE = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}


def body(content, finish_reason="stop", message=None, **top):
    """A response whose message has this content, with what this endpoint adds to the message and to the top."""
    message = {"role": "assistant", "content": content} | (message or {})
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    shared = {"id": "1", "object": "chat.completion", "created": 0, "choices": [choice], "usage": USAGE}
    return Reply(raw=json.dumps(shared | {"model": "m"} | top))


def error(status, content):
    return Reply(status=status, raw=json.dumps(content))


ANSWERED = {  # what comes, and the version that is stored with the verdict
    # https://api-docs.deepseek.com/guides/reasoning_model
    "DeepSeek": (
        body(GOOD, message={"reasoning_content": f"At first {BAD}."}, system_fingerprint="fp_3a5770e1b4"), "m/fp_3a5770e1b4"),
    # https://docs.vllm.ai/en/v0.11.2/features/reasoning_outputs: reasoning was reasoning_content; there is no fingerprint.
    "vLLM": (body(GOOD, message={"reasoning": BAD, "refusal": None, "tool_calls": []}, system_fingerprint=None), "m"),
    "vLLM before 0.11": (body(GOOD, message={"reasoning_content": BAD}, prompt_logprobs=None), "m"),
    # https://github.com/ggml-org/llama.cpp/tree/master/tools/server: the build as fingerprint, timings beside usage.
    "llama.cpp": (body(GOOD, system_fingerprint="b8468-3306dbaef", timings={"prompt_n": 9}), "m/b8468-3306dbaef"),
    # https://docs.ollama.com/api/openai-compatibility and https://github.com/ollama/ollama/issues/15288
    "Ollama": (body(GOOD, message={"reasoning": BAD}, system_fingerprint="fp_ollama"), "m/fp_ollama"),
    "no usage": (body(GOOD, usage=None), "m"),
    # https://docs.mistral.ai/capabilities/reasoning: thinking and text are parts of a list.
    "thinking in parts": (
        body([{"type": "thinking", "thinking": [{"type": "text", "text": BAD}]}, {"type": "text", "text": GOOD}]), "m"),
    "a part that says it is thinking": (body([{"type": "reasoning", "text": BAD}, {"type": "text", "text": GOOD}]), "m"),
    "no finish_reason": (body(GOOD, None), "m"),
    # https://github.com/huggingface/text-generation-inference, before its version 3
    "TGI": (body(GOOD, "eos_token"), "m"),
}  # fmt: skip

MISSING = {  # what comes, why there is no verdict, and how often it is asked for
    # https://api-docs.deepseek.com/guides/json_mode: content may come empty; /api/create-chat-completion: finish_reason.
    "DeepSeek, thinking alone": (body("", message={"reasoning_content": GOOD}), "thinking alone (finish_reason stop)", 3),
    "DeepSeek, broken off": (
        body(GOOD, "insufficient_system_resource"), "broken off (finish_reason insufficient_system_resource)", 3),
    "DeepSeek, filtered": (body(GOOD, "content_filter"), "stopped by a content filter", 1),
    # https://github.com/vllm-project/vllm/issues/19222: a parser that does not fit takes the whole answer for reasoning.
    "vLLM, all is reasoning": (body(None, message={"reasoning_content": GOOD}), "thinking alone (finish_reason stop)", 3),
    # https://github.com/vllm-project/vllm/pull/22099: an error was flat before 0.10.1, and is nested since.
    "vLLM before 0.10.1, too long": (
        error(400, {"object": "error", "message": LIMIT, "type": "BadRequestError", "param": None, "code": 400}),
        f"400: {LIMIT}", 1),
    "vLLM, too long": (
        error(400, {"error": {"message": LIMIT, "type": "BadRequestError", "param": None, "code": 400}}), f"400: {LIMIT}", 1),
    # https://github.com/ggml-org/llama.cpp/pull/15780, and with status 200 before /pull/16486
    "llama.cpp, too long": (
        error(400, {"error": {"code": 400, "message": "request (4390 tokens) exceeds the available context size (4096 tokens)",
                              "type": "exceed_context_size_error", "n_prompt_tokens": 4390, "n_ctx": 4096}}),
        "400: request (4390 tokens) exceeds", 1),
    "llama.cpp, too long with status 200": (
        error(200, {"error": {"code": 400, "message": "the request exceeds the available context size"}}),
        "an error in place of an answer: the request exceeds", 3),
    # https://github.com/ggml-org/llama.cpp/issues/20861: a template that takes no assistant message at the end
    "llama.cpp, template": (
        error(400, {"error": {"code": 400, "message": "Assistant response prefill is incompatible with enable_thinking.",
                              "type": "invalid_request_error"}}), "400: Assistant response prefill is incompatible", 1),
    # https://github.com/ollama/ollama/issues/15288
    "Ollama, thinking alone": (body("", message={"reasoning": GOOD}), "thinking alone (finish_reason stop)", 3),
    "Ollama, cut off while thinking": (body("", "length", {"reasoning": GOOD}), "cut off at the limit of 200 tokens", 1),
    # https://platform.openai.com/docs/guides/structured-outputs#refusals, and its content part of type refusal
    "a refusal": (body(None, message={"refusal": "I'm sorry, I cannot assist."}), "the model declined to answer", 1),
    "a refusal beside a verdict": (body(GOOD, message={"refusal": "I cannot."}), "the model declined to answer", 1),
    "a refusal as a part": (body([{"type": "refusal", "refusal": "I cannot."}]), "the model declined to answer", 1),
    "a refusal in words": (body("I can't help with grading this."), "the judge declined to grade", 3),
    "words": (body("It complies."), "the answers were no verdicts", 3),
    "thinking parts alone": (body([{"type": "reasoning", "text": GOOD}]), "thinking alone (finish_reason stop)", 3),
    "a tool call": (body(None, "tool_calls"), "broken off (finish_reason tool_calls)", 3),
    "nothing": (body(None), "the answers were empty (finish_reason stop)", 3),
}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store.sqlite")


def judge_at(url, store):
    endpoint = Endpoint(base_url=url, api_key_variable=None, timeout_seconds=5.0, max_attempts=2)
    return LLMJudge(endpoint, store, allow_missing=True)


@pytest.mark.parametrize("name", ANSWERED)
def test_a_verdict_is_read_from_what_follows_the_thinking(name, store):
    reply, version = ANSWERED[name]
    with serve(lambda n, asked: reply) as server:
        judge = judge_at(server.url, store)
        (judged,) = judge(*ONE, "judge")
    assert (judged.compliance, judged.coherence) == (1, 1) and server.asked.total() == 1 and judge.reported == {version: 1}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_no_answer_is_no_verdict_and_says_why(name, store, capsys):
    reply, said, times = MISSING[name]
    with serve(lambda n, asked: reply) as server:
        judge = judge_at(server.url, store)
        assert judge(*ONE, "judge") == [None] and server.asked.total() == times
    line = capsys.readouterr().err.splitlines()[-1]
    assert "gave no verdict on 1 of 1" in line and said in line and line.count("(1)") == 1
    assert not judge._versions()  # nothing is stored


def test_each_cause_is_counted_in_one_line(store, capsys):
    names = ["a refusal"] * 3 + ["DeepSeek, filtered"] * 2 + ["Ollama, cut off while thinking"] * 4
    names += ["words", "vLLM, too long", "llama.cpp, too long", "nothing", *(["well"] * 5)]
    replies = {str(i): GOOD if name == "well" else MISSING[name][0] for i, name in enumerate(names)}
    completions = [f"Sure, turn key {i}" for i in range(len(names))]
    with serve(lambda n, asked: replies[split(asked)[1].split()[-1]]) as server:
        judged = judge_at(server.url, store)(["Do x."] * len(names), completions, "judge")
    assert [v is None for v in judged] == [name != "well" for name in names]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no verdict" in line]
    assert (
        "on 13 of 18 distinct completions: the answers were cut off at the limit of 200 tokens (judge.max_tokens) (4), " in line
    )
    assert "the model declined to answer (3), the answers were stopped by a content filter (2), " in line
    assert "(1), other reasons (3); they count as missing" in line


@pytest.mark.parametrize(("status", "content", "said"), [
    # https://api-docs.deepseek.com/quick_start/error_codes
    (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error", "param": None, "code": "invalid_request_error"}},
     r"nothing left to spend \(402: Insufficient Balance\)"),
    # https://github.com/netease-youdao/QAnything/issues/555
    (404, {"error": {"message": 'model "m" not found, try pulling it first', "type": "api_error", "param": None, "code": None}},
     r'has no such model or path \(404: model "m" not found, try pulling it first\)'),
    (404, {"object": "error", "message": "The model `m` does not exist.", "type": "NotFoundError", "param": None, "code": 404},
     r"has no such model or path \(404: The model `m` does not exist.\)"),
])  # fmt: skip
def test_what_no_further_request_will_mend_stops_the_run(status, content, said, store):
    with serve(lambda n, asked: error(status, content)) as server, pytest.raises(UserError, match=said):
        judge_at(server.url, store)(*ONE, "judge")


def test_a_model_that_is_still_loading_is_waited_for(store):
    # https://github.com/ggml-org/llama.cpp/tree/master/tools/server#get-health-returns-heath-check-result
    loading = error(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
    with serve(lambda n, asked: GOOD if n else loading) as server:
        assert judge_at(server.url, store)(*ONE, "judge")[0].compliance == 1 and server.asked.total() == 2
