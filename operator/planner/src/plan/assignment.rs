//! Which request goes where, without a list of requests: surfaces whose lowest decides, the requests near a border by
//! name, and within a class of equally dear candidates the marks between one member's requests and the next one's.

use super::contest::{Contest, packed};
use super::surface::Surface;
use super::workload::Workload;
use crate::units::Tokens;
use std::collections::BTreeMap;

/// An assignment of every request of a workload to a candidate. Equal requests are interchangeable; where some of them
/// go elsewhere than others, they are dealt out in the order in which they are asked for.
#[derive(Debug, Clone)]
pub struct Assignment {
    surfaces: Vec<Surface>,
    margins: Vec<f64>,
    plain: bool,
    /// Surfaces that are near the lowest somewhere in each cell.
    masks: Vec<u64>,
    named: Table,
    splits: Vec<Vec<(usize, u64)>>,
    classes: Vec<Vec<Section>>,
}

/// A member's part of its class' requests: those before the mark.
#[derive(Debug, Clone, Copy)]
struct Section {
    candidate: usize,
    end: Option<Mark>,
}

/// A place in the order of requests by (cell, x, y); the section before the mark takes `count` of the requests there.
#[derive(Debug, Clone, Copy)]
struct Mark {
    cell: usize,
    tokens: Tokens,
    count: u64,
}

/// The parts of an assignment, see [`Assignment`].
pub(crate) struct Parts {
    pub(crate) surfaces: Vec<Surface>,
    pub(crate) margins: Vec<f64>,
    pub(crate) masks: Vec<u64>,
    /// Requests near a border, with their number by class.
    pub(crate) named: Vec<(Tokens, Vec<(usize, u64)>)>,
    /// The candidates of each class, with the number of requests of each.
    pub(crate) classes: Vec<Vec<(usize, u64)>>,
}

impl Assignment {
    pub(crate) fn new(parts: Parts, workload: &Workload) -> Self {
        let Parts { surfaces, margins, masks, named, classes } = parts;
        let mut table = Table::with_room_for(named.len());
        let mut splits = vec![];
        for (tokens, spread) in named {
            if let [(class, _)] = spread[..] {
                table.insert(tokens, class as u32);
            } else {
                table.insert(tokens, 64 + splits.len() as u32);
                splits.push(spread);
            }
        }
        let plain = surfaces.iter().all(Surface::is_plain);
        let mut assignment = Self { surfaces, margins, plain, masks, named: table, splits, classes: vec![] };
        assignment.classes =
            classes.iter().enumerate().map(|(c, members)| assignment.sections(workload, c, members)).collect();
        assignment
    }

    /// Puts candidate `order[k]` in the place of candidate k.
    pub(crate) fn rename(&mut self, order: &[usize]) {
        for section in self.classes.iter_mut().flatten() {
            section.candidate = order[section.candidate];
        }
    }

    /// Cuts the requests of a class, in order of (cell, x, y), into its members' parts.
    fn sections(&self, workload: &Workload, class: usize, members: &[(usize, u64)]) -> Vec<Section> {
        let used: Vec<_> = members.iter().filter(|(_, count)| *count > 0).collect();
        let Some(((last, _), others)) = used.split_last() else {
            return members.iter().map(|(candidate, _)| Section { candidate: *candidate, end: None }).take(1).collect();
        };
        let mut sections = vec![];
        let (mut cell, mut passed, mut until) = (0, 0, 0);
        let mut cursor = self.cursor();
        let mut before = None;
        for (candidate, count) in others {
            until += count;
            let mut end = loop {
                let here = self.in_cell(workload, cell, class, &mut cursor);
                let inside: u64 = here.values().sum();
                if passed + inside >= until {
                    let mut left = until - passed;
                    let mark = here.into_iter().find_map(|(tokens, count)| {
                        let found = (count >= left).then_some(Mark { cell, tokens, count: left });
                        left = left.saturating_sub(count);
                        found
                    });
                    cursor = self.cursor();
                    break mark;
                }
                passed += inside;
                cell += 1;
                if cell == workload.cells().len() {
                    break None;
                }
            };
            let place = end.map(|mark| (mark.cell, mark.tokens, mark.count));
            if let (Some(mark), Some((cell, tokens, taken))) = (&mut end, before)
                && (mark.cell, mark.tokens) == (cell, tokens)
            {
                mark.count -= taken;
            }
            before = place;
            sections.push(Section { candidate: *candidate, end });
        }
        sections.push(Section { candidate: *last, end: None });
        sections
    }

    /// The requests of a class in a cell, by token counts.
    fn in_cell(
        &self,
        workload: &Workload,
        cell: usize,
        class: usize,
        cursor: &mut Cursor<'_>,
    ) -> BTreeMap<Tokens, u64> {
        let mut found = BTreeMap::new();
        if self.masks[cell] & (1 << class) != 0 {
            for tokens in workload.requests(cell, cell + 1) {
                if cursor.class(cell, tokens) == class {
                    *found.entry(tokens).or_insert(0) += 1;
                }
            }
        }
        found
    }

    /// Starts dealing out requests.
    fn cursor(&self) -> Cursor<'_> {
        let taken = self.classes.iter().map(|sections| vec![0; sections.len()]).collect();
        Cursor { assignment: self, splits: self.splits.clone(), taken }
    }

    /// The candidate of each of `requests`, which must be those of the workload, in any order.
    #[must_use]
    pub fn candidates(&self, workload: &Workload, requests: &[Tokens]) -> Vec<u8> {
        let mut cursor = self.cursor();
        requests.iter().map(|tokens| cursor.candidate(workload.cell(*tokens), *tokens) as u8).collect()
    }

    /// Shows the whole workload in parts: cells that one candidate has all of, and single requests.
    pub(crate) fn visit(&self, workload: &Workload, mut see: impl FnMut(Part)) {
        let mut cursor = self.cursor();
        for (cell, node) in workload.cells().iter().enumerate() {
            if node.moments.count == 0 {
                continue;
            }
            let mask = self.masks[cell];
            let alone = mask.is_power_of_two().then(|| cursor.whole(cell, mask.trailing_zeros() as usize)).flatten();
            if let Some(candidate) = alone {
                see(Part::Cell(cell, candidate));
            } else {
                for tokens in workload.requests(cell, cell + 1) {
                    see(Part::Request(tokens, cursor.candidate(cell, tokens)));
                }
            }
        }
    }
}

/// A part of the workload, with the candidate that has it.
pub(crate) enum Part {
    Cell(usize, usize),
    Request(Tokens, usize),
}

/// Deals out requests: remembers how many of equal ones went where.
struct Cursor<'a> {
    assignment: &'a Assignment,
    splits: Vec<Vec<(usize, u64)>>,
    taken: Vec<Vec<u64>>,
}

impl Cursor<'_> {
    #[inline]
    fn class(&mut self, cell: usize, tokens: Tokens) -> usize {
        let Assignment { surfaces, margins, plain, masks, named, .. } = self.assignment;
        let mask = masks[cell];
        if mask.is_power_of_two() {
            return mask.trailing_zeros() as usize;
        }
        let contest = Contest { surfaces, margins, plain: *plain };
        let (lowest, near) = contest.at(tokens, mask);
        if near.is_power_of_two() {
            return lowest;
        }
        match named.get(tokens) {
            Some(class) if class < 64 => class as usize,
            Some(split) => {
                let spread = &mut self.splits[split as usize - 64];
                // A request that is asked for once too often is a caller's error that the check of counts finds.
                let Some((class, left)) = spread.iter_mut().find(|(_, left)| *left > 0) else { return lowest };
                *left -= 1;
                *class
            }
            None => lowest,
        }
    }

    #[inline]
    fn candidate(&mut self, cell: usize, tokens: Tokens) -> usize {
        let class = self.class(cell, tokens);
        let sections = &self.assignment.classes[class];
        if let [only] = sections[..] {
            return only.candidate;
        }
        for (section, taken) in sections.iter().zip(&mut self.taken[class]) {
            let Some(end) = section.end else { return section.candidate };
            match (cell, tokens).cmp(&(end.cell, end.tokens)) {
                std::cmp::Ordering::Less => return section.candidate,
                std::cmp::Ordering::Equal if *taken < end.count => {
                    *taken += 1;
                    return section.candidate;
                }
                _ => {}
            }
        }
        sections[sections.len() - 1].candidate
    }

    /// The candidate that has all requests of a class in a cell, if there is one.
    fn whole(&self, cell: usize, class: usize) -> Option<usize> {
        for section in &self.assignment.classes[class] {
            match section.end {
                Some(end) if end.cell < cell => {}
                Some(end) if end.cell == cell => return None,
                _ => return Some(section.candidate),
            }
        }
        None
    }
}

/// A hash table from token counts to small numbers, by linear probing.
#[derive(Debug, Clone)]
struct Table {
    slots: Vec<(u64, u32)>,
    shift: u32,
}

const VACANT: u64 = u64::MAX;

impl Table {
    fn with_room_for(entries: usize) -> Self {
        let bits = (2 * entries + 1).next_power_of_two().ilog2().max(1);
        Self { slots: vec![(VACANT, 0); 1 << bits], shift: 64 - bits }
    }

    #[inline]
    fn probe(&self, tokens: Tokens) -> (u64, usize) {
        let key = packed(tokens);
        let mut slot = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize;
        while self.slots[slot].0 != key && self.slots[slot].0 != VACANT {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        (key, slot)
    }

    fn insert(&mut self, tokens: Tokens, value: u32) {
        let (key, slot) = self.probe(tokens);
        self.slots[slot] = (key, value);
    }

    #[inline]
    fn get(&self, tokens: Tokens) -> Option<u32> {
        let (key, slot) = self.probe(tokens);
        (self.slots[slot].0 == key).then_some(self.slots[slot].1)
    }
}
