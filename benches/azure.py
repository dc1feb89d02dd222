#!/usr/bin/env python3
"""What planning is worth on a real stream of requests: the optimum beside simpler rules, over zeta.

Needs two public data sets, which are not part of this project: a trace of Azure's LLM services (Azure/AzurePublicDataset,
AzureLLMInferenceTrace_conv.csv: ContextTokens, GeneratedTokens) and measured samples of Llama-2-7B in the samples format
(Wilkins, Keshav, Mortier, arXiv 2407.04014: one prompt at a time on an A100, no KV cache). The larger Llama-2 models were not
measured there: their energy and run time are those of the 7B model times the ratio of parameters. Accuracy scores are
round figures, for the example. Prints Markdown.
"""

import argparse
import csv
import json
import os
import subprocess
import tempfile

# Name, billions of parameters, accuracy.
MODELS = [("llama2-7b", 6.74, 0.51), ("llama2-13b", 13.02, 0.56), ("llama2-70b", 68.98, 0.65)]
# Least and largest share of the requests, by model.
SHARES = {"none": [(0.0, 1.0)] * 3, "at least 5 %, at most 75 % each": [(0.05, 0.75)] * 3}


def scaled(cost, factor):
    terms = {name: value * factor for name, value in cost["terms"].items()}
    floor = cost.get("floor_terms")
    return terms | ({"floor_terms": {n: v * factor for n, v in floor.items()}} if floor else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True, help="AzureLLMInferenceTrace_conv.csv or _code.csv")
    parser.add_argument("--samples", required=True, help="samples of Llama-2-7B")
    parser.add_argument("--joulecast", default="target/release/joulecast")
    args = parser.parse_args()
    run = lambda *command: subprocess.run([args.joulecast, *command], check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        with open(args.trace) as trace, open(path("workload.csv"), "w") as workload:
            rows = [(row["ContextTokens"], row["GeneratedTokens"]) for row in csv.DictReader(trace)]
            workload.write("tau_in,tau_out\n" + "".join(f"{x},{y}\n" for x, y in rows))
        fitted = json.loads(run("fit", "--samples", args.samples, "--output", "json"))["groups"]
        group = next(g for g in fitted if "llama-2-7b" in g["model"].lower())
        for title, shares in SHARES.items():
            configs = []
            for (name, size, accuracy), (low, high) in zip(MODELS, shares):
                energy, runtime = (scaled(group[of], size / MODELS[0][1]) for of in ("energy", "runtime"))
                configs.append({"name": name, "accuracy": accuracy, "energy": energy, "runtime": runtime,
                                "share": {"min": low, "max": high}})
            with open(path("configs.json"), "w") as file:
                json.dump({"configs": configs}, file)
            print(f"\n{len(rows)} requests, shares: {title}\n")
            print("| plan | MJ | device-hours | accuracy | 7B / 13B / 70B |\n|---|---|---|---|---|")
            told = lambda name, b, counts: print(
                f"| {name} | {b['energy_j'] / 1e6:.1f} | {b['runtime_s'] / 3600:.1f} | {b['accuracy']:.4f} | {counts} |")
            for zeta in ("0", "0.25", "0.5", "0.75", "1"):
                plan = json.loads(run("plan", "--workload", path("workload.csv"), "--configs", path("configs.json"),
                                      "--zeta", zeta, "--baselines", "--output", "json"))
                told(f"optimum, zeta {zeta}", plan, " / ".join(str(plan["counts"][name]) for name, _, _ in MODELS))
                if zeta == "0.5":
                    rules = plan["baselines"]
            for name, rule in rules.items():
                told(name.replace("_", " ") + ("" if rule["feasible"] else " (breaks a share)"), rule, rule["rule"])


if __name__ == "__main__":
    main()
