//! The transportation problem in integers: units of requests go to classes, classes let out between a lower and an upper
//! number, at the least total cost. Solved exactly by successive shortest paths on a graph of the classes alone.
//!
//! A node's potential is the price of having one more request there. Moving one unit of flow from class a to class b
//! costs the least C_b - C_a over the units that have flow on a; heaps hold these differences for every ordered pair.
//! Ahuja, Magnanti, Orlin, Network Flows (1993), section 9.7.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A way out of a class: at least `lower` and at most `upper` requests leave through it at `cost` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outlet {
    pub(crate) class: usize,
    pub(crate) cost: i128,
    pub(crate) lower: u64,
    pub(crate) upper: u64,
}

/// Units with equal requests each, and the classes that each may go to, with the cost there.
#[derive(Debug, Default, Clone)]
pub(crate) struct Units {
    counts: Vec<u64>,
    /// First arc of every unit, and the number of arcs at the end.
    starts: Vec<u32>,
    class: Vec<u8>,
    cost: Vec<i128>,
    unit: Vec<u32>,
}

impl Units {
    pub(crate) fn push(&mut self, count: u64, arcs: impl Iterator<Item = (usize, i128)>) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        for (class, cost) in arcs {
            self.class.push(class as u8);
            self.cost.push(cost);
            self.unit.push(self.counts.len() as u32);
        }
        self.counts.push(count);
        self.starts.push(self.class.len() as u32);
    }

    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    pub(crate) fn arcs(&self, unit: usize) -> std::ops::Range<usize> {
        self.starts[unit] as usize..self.starts[unit + 1] as usize
    }

    pub(crate) fn class(&self, arc: usize) -> usize {
        self.class[arc].into()
    }
}

/// An instance of the problem; `inflow` is what certainly goes to each class besides the units.
pub(crate) struct Transport<'a> {
    pub(crate) units: &'a Units,
    pub(crate) outlets: &'a [Outlet],
    pub(crate) inflow: &'a [u64],
    /// Potentials to start from; any will do, good ones save work.
    pub(crate) start: &'a [i128],
    /// Each class' potential may move by this much, relative to the others', before arcs that the units lack would matter.
    pub(crate) leeway: &'a [i128],
}

/// An optimal flow and the potentials that prove it.
#[derive(Debug, Clone)]
pub(crate) struct Flow {
    pub(crate) potentials: Vec<i128>,
    /// Requests on each arc of the units.
    pub(crate) arcs: Vec<u64>,
    /// Requests through each outlet.
    pub(crate) outlets: Vec<u64>,
}

pub(crate) enum Ended {
    Optimal(Flow),
    /// The leeway was used up: start again from these potentials (`moved` tells whether they are any better).
    Strayed {
        potentials: Vec<i128>,
        moved: bool,
    },
    Stopped,
}

type Offer = Reverse<(i128, u32, u32)>;

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Move flow of one unit from one of its arcs to another.
    Shift(u32, u32),
    LetOut(usize),
    TakeBack(usize),
}

struct State<'a> {
    problem: &'a Transport<'a>,
    classes: usize,
    potentials: Vec<i128>,
    arcs: Vec<u64>,
    outlets: Vec<u64>,
    /// Flow that entered a node and did not leave it; the last node is the common sink.
    excess: Vec<i128>,
    offers: Vec<BinaryHeap<Offer>>,
    edges: Vec<Option<(i128, Step)>>,
}

impl Transport<'_> {
    /// Solves the problem. The bounds must admit a flow (their sums enclose the number of requests).
    pub(crate) fn solve(&self, stop: &dyn Fn() -> bool) -> Ended {
        let mut state = State::new(self);
        let mut moved = false;
        for round in 0usize.. {
            if round.is_multiple_of(64) && stop() {
                return Ended::Stopped;
            }
            if state.excess.iter().all(|e| *e <= 0) {
                break;
            }
            if !state.advance() {
                return Ended::Strayed { potentials: state.grounded(), moved };
            }
            moved = true;
        }
        let potentials = state.grounded();
        Ended::Optimal(Flow { potentials, arcs: state.arcs, outlets: state.outlets })
    }
}

impl<'a> State<'a> {
    fn new(problem: &'a Transport<'a>) -> Self {
        let classes = problem.inflow.len();
        let units = problem.units;
        let mut state = Self {
            problem,
            classes,
            potentials: problem.start.iter().copied().chain([0]).collect(),
            arcs: vec![0; units.class.len()],
            outlets: Vec::with_capacity(problem.outlets.len()),
            excess: problem.inflow.iter().map(|n| i128::from(*n)).chain([0]).collect(),
            offers: Vec::new(),
            edges: vec![None; (classes + 1) * (classes + 1)],
        };
        let mut offers = vec![Vec::new(); classes * classes];
        let mut total: i128 = state.excess.iter().sum();
        for unit in 0..units.len() {
            let price = |arc: usize| units.cost[arc] + state.potentials[units.class(arc)];
            let Some(best) = units.arcs(unit).min_by_key(|arc| price(*arc)) else { continue };
            state.arcs[best] = units.counts[unit];
            state.excess[units.class(best)] += i128::from(units.counts[unit]);
            total += i128::from(units.counts[unit]);
            state.offer(best, |pair, offer| offers[pair].push(offer));
        }
        state.offers = offers.into_iter().map(BinaryHeap::from).collect();
        for outlet in problem.outlets {
            // A price above zero claims that the outlet is full, one below zero that it is at its minimum.
            let flow = if state.potentials[outlet.class] > outlet.cost { outlet.upper } else { outlet.lower };
            state.outlets.push(flow);
            state.excess[outlet.class] -= i128::from(flow);
            state.excess[classes] += i128::from(flow);
        }
        state.excess[classes] -= total;
        for node in 0..=classes {
            state.refresh(node);
        }
        state
    }

    /// Lists what the unit of `arc` would cost elsewhere.
    fn offer(&self, arc: usize, mut list: impl FnMut(usize, Offer)) {
        let units = self.problem.units;
        for other in units.arcs(units.unit[arc] as usize) {
            if other != arc {
                let pair = units.class(arc) * self.classes + units.class(other);
                list(pair, Reverse((units.cost[other] - units.cost[arc], arc as u32, other as u32)));
            }
        }
    }

    /// Finds the cheapest steps out of a node anew.
    fn refresh(&mut self, node: usize) {
        let sink = self.classes;
        let row = node * (sink + 1);
        if node < sink {
            for to in 0..sink {
                let heap = &mut self.offers[node * sink + to];
                while heap.peek().is_some_and(|Reverse((_, from, _))| self.arcs[*from as usize] == 0) {
                    heap.pop();
                }
                self.edges[row + to] = heap.peek().map(|Reverse((cost, from, to))| (*cost, Step::Shift(*from, *to)));
            }
            self.edges[row + sink] = None;
        } else {
            self.edges[row..row + sink].fill(None);
        }
        for (index, outlet) in self.problem.outlets.iter().enumerate() {
            let (cell, cost, step) = if node == sink && self.outlets[index] > outlet.lower {
                (row + outlet.class, -outlet.cost, Step::TakeBack(index))
            } else if node == outlet.class && self.outlets[index] < outlet.upper {
                (row + sink, outlet.cost, Step::LetOut(index))
            } else {
                continue;
            };
            if self.edges[cell].is_none_or(|(best, _)| cost < best) {
                self.edges[cell] = Some((cost, step));
            }
        }
    }

    /// Sends flow from a node with too much along a shortest path to the nearest with too little.
    fn advance(&mut self) -> bool {
        let nodes = self.classes + 1;
        let mut distance = vec![i128::MAX; nodes];
        let mut parent = vec![usize::MAX; nodes];
        let mut done = vec![false; nodes];
        for (node, excess) in self.excess.iter().enumerate() {
            if *excess > 0 {
                distance[node] = 0;
            }
        }
        let target = loop {
            let open = (0..nodes).filter(|v| !done[*v] && distance[*v] < i128::MAX);
            let Some(node) = open.min_by_key(|v| distance[*v]) else { return false };
            if self.excess[node] < 0 {
                break node;
            }
            done[node] = true;
            for to in 0..nodes {
                let Some((cost, _)) = self.edges[node * nodes + to] else { continue };
                let reduced = cost + self.potentials[to] - self.potentials[node];
                debug_assert!(reduced >= 0, "potentials prove optimality at every step");
                if !done[to] && distance[node] + reduced < distance[to] {
                    distance[to] = distance[node] + reduced;
                    parent[to] = node;
                }
            }
        };
        let fall = |node: usize| distance[node].min(distance[target]);
        // Some common shift must bring every class back within its leeway.
        let strayed = |v: usize| self.potentials[v] - fall(v) - self.problem.start[v];
        let leeway = |v: usize| self.problem.leeway[v];
        let most = (0..self.classes).map(|v| strayed(v).saturating_sub(leeway(v))).max();
        let least = (0..self.classes).map(|v| strayed(v).saturating_add(leeway(v))).min();
        if most > least {
            return false;
        }
        for node in 0..nodes {
            self.potentials[node] -= fall(node);
        }
        self.augment(target, &parent);
        true
    }

    fn augment(&mut self, target: usize, parent: &[usize]) {
        let nodes = self.classes + 1;
        let mut path = vec![];
        let mut source = target;
        while parent[source] != usize::MAX {
            path.push((parent[source], source));
            source = parent[source];
        }
        let step = |state: &Self, (from, to): (usize, usize)| match state.edges[from * nodes + to] {
            Some((_, step)) => step,
            None => unreachable!("a path follows edges"),
        };
        let room = |state: &Self, step: Step| match step {
            Step::Shift(from, _) => state.arcs[from as usize],
            Step::LetOut(outlet) => state.problem.outlets[outlet].upper - state.outlets[outlet],
            Step::TakeBack(outlet) => state.outlets[outlet] - state.problem.outlets[outlet].lower,
        };
        let most = self.excess[source].min(-self.excess[target]);
        let amount = path.iter().map(|hop| room(self, step(self, *hop))).fold(most, |a, b| a.min(i128::from(b)));
        let flow = amount as u64;
        self.excess[source] -= amount;
        self.excess[target] += amount;
        for hop in &path {
            match step(self, *hop) {
                Step::Shift(from, to) => {
                    self.arcs[from as usize] -= flow;
                    let new = self.arcs[to as usize] == 0;
                    self.arcs[to as usize] += flow;
                    if new {
                        let mut offers = std::mem::take(&mut self.offers);
                        self.offer(to as usize, |pair, offer| offers[pair].push(offer));
                        self.offers = offers;
                    }
                }
                Step::LetOut(outlet) => self.outlets[outlet] += flow,
                Step::TakeBack(outlet) => self.outlets[outlet] -= flow,
            }
        }
        self.refresh(source);
        for (_, to) in path {
            self.refresh(to);
        }
    }

    /// The classes' potentials relative to the sink's.
    fn grounded(&self) -> Vec<i128> {
        let ground = self.potentials[self.classes];
        self.potentials[..self.classes].iter().map(|p| p - ground).collect()
    }
}
