#!/usr/bin/env python3
"""joulecast's planner beside OR-tools' SimpleMinCostFlow and HiGHS on the same instances, interleaved on one core.

Shares: requests of 16 configurations with bounds on counts. OR-tools gets them with equal requests merged; its costs are
integers, so they are scaled and rounded, and the objectives are compared within that rounding. HiGHS gets the same merged
requests as a linear program, whose optimum is whole (a transportation problem), up to a size. Budgets: HiGHS gets the
mixed integer program of a small instance and a time limit; joulecast must find an assignment wherever HiGHS does.

CPU times of the solvers on one thread; reading files and building models is left out on all sides, but for joulecast, whose
time is from the requests in memory to the checked assignment of each. Prints the median of the rounds and ratios.
`make bench-planner` installs what it needs into build/bench/venv.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np


def instance(n, seed):
    """Lognormal token counts (1 to 8192) and 16 configurations: four models on four devices."""
    random = np.random.default_rng(seed)
    count = lambda median, spread: np.clip(np.rint(median * np.exp(spread * random.standard_normal(n))), 1, 8192)
    tokens = np.stack([count(512, 1.0), count(160, 0.9)], axis=1).astype(int)
    configs = []
    for k in range(16):
        model, device = divmod(k, 4)
        size, speed = 1.8**model, 1.6**device
        cost = lambda scale, base: {
            "const": base, "tin": scale * 0.004, "tin2": scale * 2e-7, "tout": scale * 0.05,
            "tin_tout": scale * 1.1e-6, "tout2": scale * 7e-7,
        }
        configs.append({
            "name": f"m{model}-d{device}",
            "energy": cost(size * speed**0.4, 2.0 * device),
            "runtime": cost(0.02 * size / speed, 0.03 + 0.01 * model),
            "accuracy": 0.45 + 0.09 * model,
            "share": {"min": 0.02, "max": 0.10},
        })
    for config in configs:
        config["budget_seconds"] = 0.075 * float(values(config["runtime"], tokens).sum())
    return tokens, configs


def values(terms, tokens):
    x, y = tokens[:, 0].astype(float), tokens[:, 1].astype(float)
    return (terms["const"] + terms["tin"] * x + terms["tin2"] * x * x + terms["tout"] * y
            + terms["tin_tout"] * x * y + terms["tout2"] * y * y)


def costs(tokens, configs, zeta, weight):
    """The objective of every (request, configuration), with the means over `weight` equal requests each."""
    energy = np.stack([values(c["energy"], tokens) for c in configs], axis=1)
    gain = np.outer(tokens.sum(axis=1), [c["accuracy"] for c in configs]).astype(float)
    mean = lambda of: (of * weight[:, None]).sum() / (weight.sum() * len(configs))
    return zeta * energy / mean(energy) - (1 - zeta) * gain / mean(gain)


class Files:
    """An instance as joulecast reads it."""

    def __init__(self, folder, tokens, configs):
        self.workload = os.path.join(folder, "workload.csv")
        self.configs = os.path.join(folder, "configs.json")
        np.savetxt(self.workload, tokens, fmt="%d", delimiter=",", header="tau_in,tau_out", comments="")
        with open(self.configs, "w") as file:
            json.dump({"configs": configs}, file)


def joulecast(binary, files, zeta, *more):
    command = [binary, "plan", "--workload", files.workload, "--configs", files.configs, "--zeta", str(zeta),
               "--output", "json", *more]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE)
    wall = time.perf_counter() - begun
    if done.returncode not in (0, 3, 4):
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout), wall


def flow(tokens, configs, zeta):
    """Objective and seconds of SimpleMinCostFlow, equal requests merged; lower bounds as a second, free arc."""
    from ortools.graph.python import min_cost_flow

    merged, weight = np.unique(tokens, axis=0, return_counts=True)
    cost = costs(merged, configs, zeta, weight)
    scale = 1e9 / np.abs(cost).max()
    whole = np.rint(cost * scale).astype(np.int64)
    total, m, units = int(weight.sum()), len(configs), len(merged)
    solver = min_cost_flow.SimpleMinCostFlow()
    sink = units + m
    solver.add_arcs_with_capacity_and_unit_cost(
        np.repeat(np.arange(units), m), np.tile(np.arange(units, units + m), units),
        np.repeat(weight, m), whole.ravel())
    # Through the first arc goes at least the minimum: it pays for itself more than any cost.
    bonus = -int(4 * np.abs(whole).max())
    for k, config in enumerate(configs):
        low, high = bounds(config, total)
        solver.add_arc_with_capacity_and_unit_cost(units + k, sink, low, bonus)
        solver.add_arc_with_capacity_and_unit_cost(units + k, sink, high - low, 0)
    solver.set_nodes_supplies(np.arange(units), weight)
    solver.set_node_supply(sink, -total)
    begun = time.process_time()
    status = solver.solve()
    seconds = time.process_time() - begun
    if status != solver.OPTIMAL:
        sys.exit(f"SimpleMinCostFlow ended with status {status}")
    minima = sum(bounds(config, total)[0] for config in configs)
    return (solver.optimal_cost() - bonus * minima) / scale, seconds, total * 0.5 / scale


def bounds(config, total):
    """Least and largest number of requests on a configuration."""
    share = config["share"]
    return int(np.ceil(share["min"] * total - 1e-9)), int(np.floor(share["max"] * total + 1e-9))


def highs_shares(tokens, configs, zeta):
    """Objective and CPU seconds of HiGHS on the linear program of the share problem, equal requests merged."""
    import highspy
    from scipy.sparse import csc_matrix

    merged, weight = np.unique(tokens, axis=0, return_counts=True)
    n, m, total = len(merged), len(configs), int(weight.sum())
    limits = np.array([bounds(config, total) for config in configs], dtype=float)
    columns = np.arange(n * m)
    rows = np.concatenate([columns // m, n + columns % m])
    matrix = csc_matrix((np.ones(2 * n * m), (rows, np.concatenate([columns] * 2))))
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = n * m, n + m
    model.col_cost_ = costs(merged, configs, zeta, weight).ravel()
    model.col_lower_, model.col_upper_ = np.zeros(n * m), np.repeat(weight, m).astype(float)
    model.row_lower_ = np.concatenate([weight.astype(float), limits[:, 0]])
    model.row_upper_ = np.concatenate([weight.astype(float), limits[:, 1]])
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
    model.a_matrix_.value_ = matrix.data
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(model)
    begun = time.process_time()
    solver.run()
    seconds = time.process_time() - begun
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"HiGHS ended with {solver.getModelStatus()}")
    return solver.getInfo().objective_function_value, seconds


def highs(tokens, configs, zeta, limit):
    """Objective (None where nothing was found), bound and seconds of HiGHS on the time-budget problem."""
    import highspy
    from scipy.sparse import csc_matrix

    n, m = len(tokens), len(configs)
    cost = costs(tokens, configs, zeta, np.ones(n)).ravel()
    seconds = np.stack([values(c["runtime"], tokens) for c in configs], axis=1).ravel()
    columns = np.arange(n * m)
    rows = np.concatenate([columns // m, n + columns % m])
    matrix = csc_matrix((np.concatenate([np.ones(n * m), seconds]), (rows, np.concatenate([columns] * 2))))
    budgets = [c["budget_seconds"] for c in configs]
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = n * m, n + m
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, np.zeros(n * m), np.ones(n * m)
    model.row_lower_ = np.concatenate([np.ones(n), np.full(m, -np.inf)])
    model.row_upper_ = np.concatenate([np.ones(n), budgets])
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
    model.a_matrix_.value_ = matrix.data
    model.integrality_ = [highspy.HighsVarType.kInteger] * (n * m)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", float(limit))
    solver.passModel(model)
    begun = time.perf_counter()
    solver.run()
    spent = time.perf_counter() - begun
    info = solver.getInfo()
    found = info.primal_solution_status == 2
    return (info.objective_function_value if found else None), info.mip_dual_bound, spent


def apart(call, *arguments):
    """OR-tools and highspy bring a HiGHS each, under one name: they do not fit into one process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return other.submit(call, *arguments).result()


def shares(args, folder, n):
    tokens, configs = instance(n, args.seed)
    files = Files(folder, tokens, configs)
    ours, whole, theirs, linear = [], [], [], []
    for _ in range(args.rounds):
        plan, wall = joulecast(args.joulecast, files, args.zeta)
        objective, seconds, rounding = flow(tokens, configs, args.zeta)
        if n <= args.highs_size:
            value, spent = apart(highs_shares, tokens, configs, args.zeta)
            if abs(plan["objective"] - value) > 1e-6 * max(1, abs(value)):
                sys.exit(f"shares, {n}: joulecast says {plan['objective']}, HiGHS {value}")
            linear.append(spent)
        if not plan["feasible"] or plan["gap"] != 0 or abs(plan["objective"] - objective) > rounding + 1e-6:
            sys.exit(f"shares, {n}: joulecast says {plan['objective']} (gap {plan['gap']}), OR-tools {objective}")
        ours.append(plan["solve_cpu_seconds"])
        whole.append(wall)
        theirs.append(seconds)
    a, w, b = (statistics.median(s) for s in (ours, whole, theirs))
    told = f"  HiGHS {statistics.median(linear):8.3f} s {statistics.median(linear) / a:7.0f} times" if linear else ""
    print(f"shares   {n:>9} requests  joulecast {1e3 * a:9.2f} ms (process {w:6.3f} s)  OR-tools flow {b:8.3f} s  "
          f"{b / a:7.0f} times as long{told}, same objective", flush=True)


def budgets(args, folder, n):
    tokens, configs = instance(n, args.seed)
    files = Files(folder, tokens, configs)
    plan, _ = joulecast(args.joulecast, files, args.zeta, "--constraint", "budget", "--time-limit", "30")
    found, bound, spent = apart(highs, tokens, configs, args.zeta, args.highs_seconds)
    if found is not None and not plan["feasible"]:
        sys.exit(f"budgets, {n}: HiGHS finds {found}, joulecast nothing")
    told = "nothing" if found is None else f"{found:.5f} (bound {bound:.5f})"
    print(f"budgets  {n:>9} requests  joulecast {plan['objective']:.5f} (bound {plan['lower_bound']:.5f}, gap "
          f"{plan['gap']:.1e}) in {plan['solve_seconds']:.2f} s  HiGHS {told} in {spent:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joulecast", default="target/release/joulecast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zeta", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 10_000, 100_000])
    parser.add_argument("--budget-sizes", type=int, nargs="*", default=[100, 500])
    parser.add_argument("--highs-seconds", type=float, default=60, help="time limit of HiGHS on budgets")
    parser.add_argument("--highs-size", type=int, default=10_000, help="largest share problem that HiGHS is given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for n in args.sizes:
            shares(args, folder, n)
        for n in args.budget_sizes:
            budgets(args, folder, n)


if __name__ == "__main__":
    main()
