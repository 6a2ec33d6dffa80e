#!/usr/bin/env python3
"""The real evaluation harnesses against the service, on small local data: alpaca_eval with a judge that we answer too, evalplus
code generation, promptbench's OpenAI model class, and the request that LiveBench makes (it is not on PyPI).

    oracle_clients.py URL
"""
import importlib.util
import json
import math
import os
import pathlib
import shutil
import sys
import types

sys.path.insert(0, str(pathlib.Path(__file__).parent))
WORK = pathlib.Path("target/oracle/clients-work").absolute()
shutil.rmtree(WORK, ignore_errors=True)
WORK.mkdir(parents=True)
URL = sys.argv[1]
MODEL, JUDGE = "clients-merged", "gpt-4-1106-preview"
RECIPE = {"method": "average", "models": ["math", "sentiment"], "mixup": {"lambda": 0.6}, "dtype": "bfloat16"}
PROBLEMS = 164
os.environ |= {"OPENAI_API_KEY": "unused", "OPENAI_BASE_URL": f"{URL}/v1", "OPENAI_API_BASE": f"{URL}/v1", "HF_HUB_OFFLINE": "1",
               "HF_DATASETS_OFFLINE": "1", "OPENAI_MAX_CONCURRENCY": "2", "IS_ALPACA_EVAL_2": "True",
               "HUMANEVAL_OVERRIDE_PATH": str(WORK / "problems.jsonl")}

from service import Service  # noqa: E402


def alpaca():
    from alpaca_eval import evaluate_from_model
    instructions = ["Name three colours.", "What is two plus three?", "Write a greeting.", "Give a word that rhymes with cat."]
    data = [{"instruction": text, "dataset": "local", "output": "I do not know.", "generator": "reference"} for text in instructions]
    (WORK / "data.json").write_text(json.dumps(data))
    (WORK / "prompt.txt").write_text("<|im_start|>user\n{instruction}\n<|im_end|>")
    config = {MODEL: {"prompt_template": str(WORK / "prompt.txt"), "fn_completions": "openai_completions", "pretty_name": MODEL,
                      "completions_kwargs": {"model_name": MODEL, "max_tokens": 48, "temperature": 0}}}
    board, annotations = evaluate_from_model(
        model_configs=config, evaluation_dataset=WORK / "data.json", annotators_config="weighted_alpaca_eval_gpt4_turbo",
        output_path=WORK / "alpaca", is_return_instead_of_print=True, precomputed_leaderboard=None, is_cache_leaderboard=False,
        fn_metric="get_winrate", sort_by="win_rate")  # the length-controlled one fetches a table from the hub
    outputs = json.loads((WORK / "alpaca/model_outputs.json").read_text())
    assert [o["instruction"] for o in outputs] == instructions and all(o["output"].strip() for o in outputs), outputs
    assert len(annotations) == len(instructions) and len(board) >= 1
    preferences = [a["preference"] for a in annotations]
    assert all(p is not None and (math.isnan(p) or 1 <= p <= 2) for p in preferences), preferences
    judged = sum(not math.isnan(p) for p in preferences)
    assert all(a["preference_raw_completion"] for a in annotations), annotations
    return f"{len(outputs)} answers in order, {judged} judged with log-probabilities"


def evalplus():
    problem = lambda i: {
        "task_id": f"HumanEval/{i}", "prompt": f"def add_{i}(a, b):\n    \"\"\"Returns a plus b plus {i}.\"\"\"\n",
        "entry_point": f"add_{i}", "canonical_solution": f"    return a + b + {i}\n", "contract": "", "test": "",
        "base_input": [[1, 2]], "plus_input": [], "atol": 0}
    with open(WORK / "problems.jsonl", "w") as f:
        f.writelines(json.dumps(problem(i)) + "\n" for i in range(PROBLEMS))
    from evalplus.codegen import run_codegen
    run_codegen(model=MODEL, dataset="humaneval", root=str(WORK / "evalplus"), n_samples=8, bs=8, temperature=0.8, id_range=[0, 2],
                backend="openai", base_url=f"{URL}/v1")
    (file,) = [f for f in (WORK / "evalplus/humaneval").glob("*.jsonl") if ".raw" not in f.name]
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    raw = [json.loads(line) for line in file.with_suffix(".raw.jsonl").read_text().splitlines()]
    assert sorted({s["task_id"] for s in samples}) == ["HumanEval/0", "HumanEval/1"] and len(samples) == len(raw) == 16
    texts = [s["solution"] for s in raw]
    assert all(text.strip() for text in texts), texts
    return f"{len(samples)} samples of 2 problems, 8 a request"


def promptbench():
    # The package imports every back end it has; only its model classes are wanted, and OpenAI's needs no torch.
    found = importlib.util.find_spec("promptbench")
    package = types.ModuleType("promptbench")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["promptbench"] = package
    sys.modules["torch"] = types.ModuleType("torch")
    from promptbench.models import LLMModel
    del sys.modules["torch"]
    model = LLMModel(model="gpt-3.5-turbo", max_new_tokens=16, temperature=0, api_key="unused")
    one = model("Name three colours.")
    many = model("Name three colours.", n=3, temperature=0.9)
    assert isinstance(one, str) and one.strip() and len(many) == 3 and all(m.strip() for m in many), (one, many)
    assert one == model("Name three colours.")
    return "one and three answers under the name gpt-3.5-turbo"


def livebench():
    import openai
    client = openai.OpenAI(timeout=600)
    for limit in ("max_tokens", "max_completion_tokens"):
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Name three colours."}], temperature=0, stream=True,
            stream_options={"include_usage": True}, **{limit: 24})
        text, usage = "", None
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content is not None:
                text += chunk.choices[0].delta.content
            if chunk.usage is not None:
                usage = chunk.usage
        assert text.strip() and usage.completion_tokens > 0, (text, usage)
    return f"streams with {usage.completion_tokens} tokens counted"


def main():
    service = Service(URL)
    merged, _ = service.merge(RECIPE)
    service.load(MODEL, f"checkpoint:{merged.name}", aliases=["gpt-3.5-turbo", JUDGE])
    for client in (livebench, promptbench, evalplus, alpaca):
        print(f"{client.__name__}: {client()}", flush=True)


if __name__ == "__main__":
    main()
