//! Lowers the cost of a whole assignment by chains of moves, from the rounded relaxation at first and then from there or
//! from the best so far, with a temperature that falls (Kirkpatrick, Gelatt, Vecchi, Science 220 (1983), 671-680).
//!
//! A chain begins with any move or with one that fills what a limit leaves. Then, while a limit is exceeded, the move that
//! gives back to it best follows, and else one that fills the room which the last move left (ejection chains: Yagiura,
//! Ibaraki, Glover, INFORMS J. Computing 16 (2004), 133-151). Limits are filled from lists of moves in order of size.
//!
//! The energy is what the assignment costs above the prices' bound: each request's regret, what limits leave at their
//! price, and a penalty on what exceeds them. Chance is a fixed sequence of numbers and work is counted in steps, so that
//! the same problem has the same outcome.

use super::Repair;

/// Steps from hot to cold.
const ROUND: u64 = 10_000;
/// First and last temperature, as parts of what one request's use of limits is worth.
const HOT: f64 = 5e-3;
const COLD: f64 = 2e-5;
/// Requests that a chain moves at most.
const CHAIN: usize = 6;
/// Moves of about the right size that are compared, and looked at for it.
const COMPARED: usize = 4;
const LOOKED_AT: usize = 16;
/// What exceeding a limit weighs at first, as a multiple of its price.
const PENALTY: f64 = 4.0;
/// Steps between questions whether to stop.
const ASK: u64 = 4096;
/// Values of the exponential distribution that temperatures are multiplied by.
const VALUES: usize = 1024;

/// Numbers without a pattern (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
struct Sequence(u64);

impl Sequence {
    /// One of the numbers below `n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((((z ^ (z >> 31)) >> 32) * n as u64) >> 32) as usize
    }
}

/// A move of a request between two arcs of its unit, with what it adds to (or takes from) one candidate's own row.
#[derive(Debug, Clone, Copy)]
struct Sized {
    size: f64,
    from: u32,
    to: u32,
}

pub(super) struct Anneal<'a> {
    repair: &'a Repair<'a>,
    /// Priced cost above the unit's least, and the unit, by arc.
    regret: Vec<f64>,
    unit: Vec<u32>,
    /// The row that a candidate's moves are ordered by.
    own: Vec<Option<usize>>,
    /// Whether candidates have rows in common.
    shared: bool,
    /// Moves from one candidate to another: by what they give back to the first's own row, and by what they add to the second's.
    giving: Vec<Vec<Sized>>,
    filling: Vec<Vec<Sized>>,
    /// No arc of more regret is taken.
    reach: f64,
    penalty: Vec<f64>,
    flow: Vec<u64>,
    left: Vec<f64>,
    before: Vec<f64>,
    /// Arcs with requests, by candidate, and each one's place there.
    held: Vec<Vec<u32>>,
    place: Vec<u32>,
    energy: f64,
    best: f64,
    best_flow: Vec<u64>,
    /// Moves since the best; more than there are arcs are not kept.
    since: Vec<(u32, u32)>,
    sequence: Sequence,
}

impl<'a> Anneal<'a> {
    /// Starts from the assignment as it is.
    pub(super) fn new(repair: &'a Repair<'a>) -> Self {
        let Repair { core, rows, priced, .. } = repair;
        let mut regret = vec![0.0; priced.len()];
        let mut unit_of = vec![0; priced.len()];
        for unit in 0..core.len() {
            let least = core.arcs(unit).map(|arc| priced[arc]).fold(f64::INFINITY, f64::min);
            for arc in core.arcs(unit) {
                regret[arc] = priced[arc] - least;
                unit_of[arc] = unit as u32;
            }
        }
        let all: usize = rows.of.iter().map(Vec::len).sum();
        Self {
            repair,
            regret,
            unit: unit_of,
            own: rows
                .of
                .iter()
                .map(|of| of.iter().copied().max_by_key(|row| rows.list[*row].measure.is_of_time()))
                .collect(),
            shared: all > rows.len(),
            giving: vec![],
            filling: vec![],
            reach: f64::INFINITY,
            penalty: repair.weight.iter().map(|weight| PENALTY * weight).collect(),
            flow: vec![],
            left: vec![],
            before: vec![],
            held: vec![],
            place: vec![],
            energy: 0.0,
            best: f64::INFINITY,
            best_flow: repair.flow.clone(),
            since: vec![],
            sequence: Sequence(0),
        }
    }

    /// Searches until no more than `enough` could be gained, or for a number of steps. None: no assignment within the
    /// limits was found.
    pub(super) fn run(mut self, enough: f64, steps: u64) -> Option<Vec<u64>> {
        let size = self.size();
        self.list(size);
        let exponential: Vec<f64> = (0..VALUES).map(|i| -((i as f64 + 0.5) / VALUES as f64).ln()).collect();
        let cooling = (COLD / HOT).powf(1.0 / ROUND as f64);
        let mut temperature = 0.0;
        for step in 0..steps {
            if step % ROUND == 0 {
                temperature = HOT * size;
                let found = self.best.is_finite();
                if step > 0 && !found {
                    self.penalty.iter_mut().for_each(|penalty| *penalty *= 2.0);
                }
                // From the relaxation and from the best in turns.
                let begin =
                    if found && step / ROUND % 2 == 1 { self.best_flow.clone() } else { self.repair.flow.clone() };
                self.begin(begin);
                if self.best < 0.5 * self.reach {
                    // No better assignment takes an arc of more regret than the best has in all.
                    self.list(self.best);
                }
            }
            if self.best <= enough || (step % ASK == ASK - 1 && (self.repair.stop)()) {
                break;
            }
            temperature *= cooling;
            let allowed = temperature * exponential[self.sequence.below(VALUES)];
            self.attempt(allowed);
        }
        self.best.is_finite().then_some(self.best_flow)
    }

    /// What one request's use of limits is worth, in the mean.
    fn size(&self) -> f64 {
        let Repair { core, rows, prices, flow, .. } = self.repair;
        let (mut worth, mut n) = (0.0, 0.0);
        for arc in (0..flow.len()).filter(|arc| flow[*arc] > 0) {
            worth += core.uses(rows, arc).map(|(row, usage)| prices[row] * usage.abs()).sum::<f64>();
            n += 1.0;
        }
        worth / f64::max(n, 1.0)
    }

    /// Lists the moves between arcs of at most this regret.
    fn list(&mut self, reach: f64) {
        let Repair { core, rows, .. } = self.repair;
        let n = rows.of.len();
        self.reach = reach;
        let sizes: Vec<f64> = (0..self.regret.len())
            .map(|arc| core.uses(rows, arc).find(|(row, _)| self.own[core.who[arc]] == Some(*row)).map_or(0.0, |u| u.1))
            .collect();
        self.giving = vec![vec![]; n * n];
        self.filling = vec![vec![]; n * n];
        for unit in 0..core.len() {
            for from in core.arcs(unit).filter(|arc| self.regret[*arc] <= reach) {
                for to in core.arcs(unit).filter(|to| *to != from && self.regret[*to] <= reach) {
                    let pair = core.who[from] * n + core.who[to];
                    self.giving[pair].push(Sized { size: sizes[from], from: from as u32, to: to as u32 });
                    self.filling[pair].push(Sized { size: sizes[to], from: from as u32, to: to as u32 });
                }
            }
        }
        for list in self.giving.iter_mut().chain(&mut self.filling) {
            list.sort_by(|a, b| a.size.total_cmp(&b.size));
        }
    }

    /// Starts again from an assignment.
    fn begin(&mut self, flow: Vec<u64>) {
        let Repair { core, rows, .. } = self.repair;
        self.left.clone_from(&core.left);
        self.held = vec![vec![]; rows.of.len()];
        self.place = vec![0; flow.len()];
        for arc in (0..flow.len()).filter(|arc| flow[*arc] > 0) {
            for (row, usage) in core.uses(rows, arc) {
                self.left[row] -= usage * flow[arc] as f64;
            }
            if core.arcs(self.unit[arc] as usize).len() > 1 {
                self.place[arc] = self.held[core.who[arc]].len() as u32;
                self.held[core.who[arc]].push(arc as u32);
            }
        }
        self.before.clone_from(&self.left);
        let regrets: f64 = self.regret.iter().zip(&flow).map(|(regret, n)| regret * *n as f64).sum();
        self.energy = regrets + (0..self.left.len()).map(|row| self.worth(row, self.left[row])).sum::<f64>();
        // The best is to be copied whole.
        self.since = vec![(0, 0); flow.len() + 1];
        self.flow = flow;
        self.remember();
    }

    /// What a row's room, or its excess, costs.
    #[inline]
    fn worth(&self, row: usize, left: f64) -> f64 {
        if left >= 0.0 {
            self.repair.prices[row] * left
        } else if left >= -self.repair.slops[row] {
            0.0
        } else {
            -self.penalty[row] * left
        }
    }

    /// Change of the energy by a move.
    #[inline]
    fn change(&self, from: usize, to: usize) -> f64 {
        let Repair { core, rows, .. } = self.repair;
        let by = |row: usize, take: f64| self.worth(row, self.left[row] - take) - self.worth(row, self.left[row]);
        let mut change = self.regret[to] - self.regret[from];
        if self.shared {
            let in_row = |arc: usize, row: usize| core.uses(rows, arc).find(|(r, _)| *r == row).map(|(_, usage)| usage);
            for (row, usage) in core.uses(rows, from) {
                change += by(row, in_row(to, row).unwrap_or(0.0) - usage);
            }
            for (row, usage) in core.uses(rows, to).filter(|(row, _)| in_row(from, *row).is_none()) {
                change += by(row, usage);
            }
        } else {
            change += core.uses(rows, from).map(|(row, usage)| by(row, -usage)).sum::<f64>();
            change += core.uses(rows, to).map(|(row, usage)| by(row, usage)).sum::<f64>();
        }
        change
    }

    /// Tries one chain; it stays if the energy does not rise by more than is allowed.
    fn attempt(&mut self, allowed: f64) {
        let Repair { core, rows, .. } = self.repair;
        let mut chain = [(0, 0); CHAIN];
        let (mut made, mut change) = (0, 0.0);
        let mut next = self.first();
        while let Some((from, to)) = next {
            change += self.change(from, to);
            for (row, usage) in core.uses(rows, from) {
                self.left[row] += usage;
            }
            for (row, usage) in core.uses(rows, to) {
                self.left[row] -= usage;
            }
            chain[made] = (from, to);
            made += 1;
            if change <= allowed || made == CHAIN {
                break;
            }
            next = match self.short(core.who[to]) {
                Some(need) => self.give(core.who[to], need, &chain[..made]),
                None => self.fill(core.who[from], &chain[..made]),
            };
        }
        if made == 0 || change > allowed {
            self.left.copy_from_slice(&self.before);
            return;
        }
        self.before.copy_from_slice(&self.left);
        self.energy += change;
        for &(from, to) in &chain[..made] {
            self.shift(from, to);
        }
        self.remember();
    }

    /// By how much a candidate's own row is exceeded.
    fn short(&self, k: usize) -> Option<f64> {
        let row = self.own[k]?;
        (self.left[row] < -self.repair.slops[row]).then_some(-self.left[row])
    }

    /// Any move, or one that fills the own row of a candidate.
    fn first(&mut self) -> Option<(usize, usize)> {
        let n = self.held.len();
        let k = self.sequence.below(n);
        match self.sequence.below(4) {
            0 => self.fill(k, &[]),
            1 => {
                let room = |k: usize| self.own[k].map_or(0.0, |row| self.repair.prices[row] * self.left[row]);
                let most = (0..n).max_by(|a, b| room(*a).total_cmp(&room(*b)))?;
                self.fill(most, &[])
            }
            _ => {
                if self.held[k].is_empty() {
                    return None;
                }
                let from = self.held[k][self.sequence.below(self.held[k].len())] as usize;
                let arcs = self.repair.core.arcs(self.unit[from] as usize);
                let to = arcs.start + self.sequence.below(arcs.len() - 1);
                let to = to + usize::from(to >= from);
                (self.regret[to] <= self.reach).then_some((from, to))
            }
        }
    }

    /// The best of the moves that just give back what a candidate's own row needs.
    fn give(&self, k: usize, need: f64, chain: &[(usize, usize)]) -> Option<(usize, usize)> {
        let n = self.held.len();
        let mut best = None;
        for list in &self.giving[k * n..(k + 1) * n] {
            let first = list.partition_point(|step| step.size < need);
            self.best_of(list[first..].iter().take(LOOKED_AT), chain, &mut best);
        }
        best.map(|(_, step)| step)
    }

    /// The best of the moves from some candidate that just fit into the room of another's own row.
    fn fill(&mut self, k: usize, chain: &[(usize, usize)]) -> Option<(usize, usize)> {
        let n = self.held.len();
        let sources = || (0..n).filter(|from| !self.filling[from * n + k].is_empty());
        let room = self.left[self.own[k]?];
        let number = sources().count();
        if number == 0 {
            return None;
        }
        let drawn = self.sequence.below(number);
        let from = (0..n).filter(|from| !self.filling[from * n + k].is_empty()).nth(drawn)?;
        let list = &self.filling[from * n + k];
        let end = list.partition_point(|step| step.size <= room);
        let mut best = None;
        self.best_of(list[..end].iter().rev().take(LOOKED_AT), chain, &mut best);
        best.map(|(_, step)| step)
    }

    fn best_of<'s>(
        &self,
        steps: impl Iterator<Item = &'s Sized>,
        chain: &[(usize, usize)],
        best: &mut Option<(f64, (usize, usize))>,
    ) {
        let mut compared = 0;
        for step in steps {
            let (from, to) = (step.from as usize, step.to as usize);
            if self.flow[from] <= chain.iter().filter(|step| step.0 == from).count() as u64 {
                continue;
            }
            let change = self.change(from, to);
            if best.is_none_or(|(least, _)| change < least) {
                *best = Some((change, (from, to)));
            }
            compared += 1;
            if compared == COMPARED {
                break;
            }
        }
    }

    fn shift(&mut self, from: usize, to: usize) {
        let who = &self.repair.core.who;
        self.flow[from] -= 1;
        if self.flow[from] == 0 {
            let (list, at) = (&mut self.held[who[from]], self.place[from] as usize);
            list.swap_remove(at);
            if let Some(moved) = list.get(at) {
                self.place[*moved as usize] = at as u32;
            }
        }
        if self.flow[to] == 0 {
            self.place[to] = self.held[who[to]].len() as u32;
            self.held[who[to]].push(to as u32);
        }
        self.flow[to] += 1;
        if self.since.len() <= self.flow.len() {
            self.since.push((from as u32, to as u32));
        }
    }

    /// Keeps the assignment if it is the best within the limits.
    fn remember(&mut self) {
        let kept = || self.left.iter().zip(&self.repair.slops).all(|(left, slop)| *left >= -slop);
        if self.energy >= self.best || !kept() {
            return;
        }
        self.best = self.energy;
        if self.since.len() > self.flow.len() {
            self.best_flow.copy_from_slice(&self.flow);
        } else {
            for (from, to) in &self.since {
                self.best_flow[*from as usize] -= 1;
                self.best_flow[*to as usize] += 1;
            }
        }
        self.since.clear();
    }
}
