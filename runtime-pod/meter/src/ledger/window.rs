//! A window over the ledger: what one pod was charged between two of its edges, and whether that can be believed.

use super::{Account, Charge, Ledger};
use crate::units::{Microjoules, Milliwatts};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One end of a window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// When.
    pub at: Duration,
    /// The state of each domain, in the order of the ledger.
    domains: Vec<DomainEdge>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct DomainEdge {
    charge: Charge,
    breaks: u64,
    /// Whether the domain was accounted for up to this very moment.
    read: bool,
    /// Whether idle energy was told apart, or none of it is this pod's.
    idle_known: bool,
}

/// Energy of one domain in a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Figure {
    /// It is known.
    Known {
        /// Net and idle.
        gross: Microjoules,
        /// Idle energy of the slot, where idle power is known.
        idle: Option<Microjoules>,
    },
    /// There was no reading at one of the edges, or the counter was lost between them; with the reason.
    Absent(String),
    /// The figure cannot be true; with the reason.
    Invalid(String),
}

/// Energy of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metered {
    /// Length of the window.
    pub length: Duration,
    /// By domain: its name, whether gross counts it, its energy. A domain of which nothing is ever this pod's is missing.
    pub domains: Vec<(String, bool, Figure)>,
}

impl Metered {
    /// All domains that gross counts; `None` if one of them is not known.
    #[must_use]
    pub fn gross(&self) -> Option<Microjoules> {
        self.sum(|figure| if let Figure::Known { gross, .. } = figure { Some(*gross) } else { None })
    }

    /// Idle energy in gross; `None` if it is not known for one of the domains.
    #[must_use]
    pub fn idle(&self) -> Option<Microjoules> {
        self.sum(|figure| if let Figure::Known { idle, .. } = figure { *idle } else { None })
    }

    fn sum(&self, of: impl Fn(&Figure) -> Option<Microjoules>) -> Option<Microjoules> {
        let mut counted = self.domains.iter().filter(|(_, in_gross, _)| *in_gross).peekable();
        counted.peek()?;
        counted.try_fold(Microjoules(0), |sum, (_, _, figure)| Some(sum.plus(of(figure)?)))
    }
}

impl Ledger {
    /// An edge for a pod at the moment of the step that was just made.
    #[must_use]
    pub fn edge(&self, holder: &str, at: Duration) -> Edge {
        let edge = |account: &Account| DomainEdge {
            charge: account.books.holders.get(holder).copied().unwrap_or_default(),
            breaks: account.breaks,
            read: account.last.as_ref().is_some_and(|last| last.at == at),
            idle_known: account.idle.is_some() || !self.holds(&account.domain, holder),
        };
        Edge { at, domains: self.accounts.iter().map(edge).collect() }
    }

    /// What a pod was charged between two of its edges. Domains that are another's whole are left out.
    #[must_use]
    pub fn between(&self, holder: &str, from: &Edge, to: &Edge) -> Metered {
        let length = to.at.saturating_sub(from.at);
        let edges = from.domains.iter().zip(&to.domains);
        let of = |(account, (from, to)): (&Account, (&DomainEdge, &DomainEdge))| {
            let concerned = match account.domain.division {
                super::Division::CpuTime { .. } => true,
                super::Division::Whole | super::Division::Slices(_) => self.holds(&account.domain, holder),
            };
            concerned.then(|| {
                let figure = figure(account, from, to, length);
                (account.domain.name.clone(), account.domain.in_gross, figure)
            })
        };
        Metered { length, domains: self.accounts.iter().zip(edges).filter_map(of).collect() }
    }
}

fn figure(account: &Account, from: &DomainEdge, to: &DomainEdge, length: Duration) -> Figure {
    if from.breaks != to.breaks {
        return Figure::Absent(format!("the counter was lost within the window: {}", account.why));
    }
    if !from.read || !to.read {
        let end = if to.read { "begin" } else { "end" };
        return Figure::Absent(format!("the counter could not be read at the window's {end}"));
    }
    let used = |to: u64, from: u64| to.checked_sub(from).map(Microjoules);
    let (Some(net), Some(idle)) = (used(to.charge.net, from.charge.net), used(to.charge.idle, from.charge.idle)) else {
        return Figure::Invalid("less energy at the end than at the begin".to_owned());
    };
    let gross = net.plus(idle);
    if let Err(why) = believable(gross, account.domain.max, length, account.domain.lag) {
        return Figure::Invalid(why);
    }
    Figure::Known { gross, idle: (from.idle_known && to.idle_known).then_some(idle) }
}

/// Whether an energy can have been used: at most `max` over the time and the counter's lag.
fn believable(energy: Microjoules, max: Milliwatts, length: Duration, lag: Duration) -> Result<(), String> {
    if energy <= max.over(length + lag) {
        return Ok(());
    }
    Err(format!("{:.3} J within {length:.3?} is more than {} W", energy.joules(), max.watts()))
}
