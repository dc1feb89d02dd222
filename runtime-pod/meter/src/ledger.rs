//! Who used a node's energy: the counters' movement, step by step, divided among those who hold slots and everybody else.
//!
//! In a step of length T a domain's counter moved by E. Of that, idle = min(E, idle power x T); the rest is dynamic. A
//! package's dynamic energy (and that of its memory) is divided by CPU time: a pod that used c of the node's C CPU-seconds
//! on that package gets `dynamic * c / C`. A GPU belongs to its holder whole. A GPU in MIG mode has one counter for all its
//! instances: dynamic energy is divided among those that are held, by their slices, which is an estimate. Idle energy is
//! charged to the holder of the slot, if there is one, and stands apart.
//!
//! Invariant: in every domain and at any moment, moved = idle + net of holders + other pods + system, to one microjoule.
//! `system` is what was worked for no pod, and the remainders of division.

use crate::cgroup_time::{CpuTimes, PackageTimes};
use crate::division::divide;
use crate::units::{Microjoules, Milliwatts};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

mod window;
pub use window::{Edge, Figure, Metered};

/// How a domain's dynamic energy is divided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Division {
    /// By CPU time on the package with this index.
    CpuTime {
        /// Index among the machine's packages.
        package: usize,
    },
    /// All of it to the holder of the domain's slot.
    Whole,
    /// By slices among the slots that are held, idle energy by slices among all.
    Slices(Vec<Share>),
}

/// A slot's part of a domain that several slots share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The slot.
    pub slot: String,
    /// Its slices.
    pub slices: u64,
}

/// A domain of energy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Name in reports.
    pub name: String,
    /// How it is divided.
    pub division: Division,
    /// Whether gross energy counts it; a part of another domain is reported beside.
    pub in_gross: bool,
    /// The slot whose holder is charged with idle energy, and with everything where the division is [`Division::Whole`];
    /// empty where several slots share the domain.
    pub slot: String,
    /// More power than it can draw: what implies more is not believed.
    pub max: Milliwatts,
    /// The longest time by which its counter may lag.
    pub lag: Duration,
}

/// Energy of one party in one domain since the ledger was opened, in microjoules.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// Dynamic energy.
    pub net: u64,
    /// Idle energy of the slot that it holds.
    pub idle: u64,
}

/// Where a domain's energy went since the ledger was opened, in microjoules.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Books {
    /// What the counter moved.
    pub moved: u64,
    /// Idle energy, whoever was charged with it.
    pub idle: u64,
    /// Pods that hold slots, by UID.
    pub holders: BTreeMap<String, Charge>,
    /// Net energy of pods that held slots and are gone.
    pub departed: u64,
    /// All other pods together.
    pub other_pods: u64,
    /// What is no pod, and the remainders of division.
    pub system: u64,
}

impl Books {
    /// What the parties make up; equal to `moved`.
    #[must_use]
    pub fn accounted(&self) -> u64 {
        let holders: u64 = self.holders.values().map(|charge| charge.net).sum();
        self.idle + holders + self.departed + self.other_pods + self.system
    }
}

/// The ledger of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    accounts: Vec<Account>,
    /// Holder by slot.
    owners: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Account {
    domain: Domain,
    idle: Option<Milliwatts>,
    last: Option<Last>,
    /// How often its energy could not be told.
    breaks: u64,
    why: String,
    books: Books,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Last {
    at: Duration,
    total: u64,
    #[serde(with = "shared")]
    cpu: Arc<CpuTimes>,
}

/// CPU times that all domains of a step share in memory are written with each of them: serde's own support of `Arc` is a
/// feature that would be switched on for the whole workspace.
mod shared {
    use super::{Arc, CpuTimes};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(times: &Arc<CpuTimes>, to: S) -> Result<S::Ok, S::Error> {
        CpuTimes::serialize(times, to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<CpuTimes>, D::Error> {
        CpuTimes::deserialize(from).map(Arc::new)
    }
}

impl Ledger {
    /// An empty ledger over these domains.
    #[must_use]
    pub fn new(domains: Vec<Domain>) -> Self {
        let account =
            |domain| Account { domain, idle: None, last: None, breaks: 0, why: String::new(), books: Books::default() };
        Self { accounts: domains.into_iter().map(account).collect(), owners: BTreeMap::new() }
    }

    /// The domains.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.accounts.iter().map(|account| &account.domain)
    }

    /// Where the energy of each domain went.
    pub fn books(&self) -> impl Iterator<Item = (&Domain, &Books)> {
        self.accounts.iter().map(|account| (&account.domain, &account.books))
    }

    /// Idle power of a domain, if it is known.
    #[must_use]
    pub fn idle(&self, domain: usize) -> Option<Milliwatts> {
        self.accounts.get(domain)?.idle
    }

    /// Idle power of all domains that a holder pays the idle energy of; `None` if one of them is not known.
    #[must_use]
    pub fn idle_of(&self, holder: &str) -> Option<Milliwatts> {
        self.accounts
            .iter()
            .filter(|account| account.domain.in_gross)
            .map(|account| (account, account.domain.part_of(holder, &self.owners)))
            .filter(|(_, (own, _))| *own > 0)
            .try_fold(Milliwatts(0), |sum, (account, (own, all))| {
                Some(Milliwatts(sum.0.saturating_add(account.idle?.0 * own / all)))
            })
    }

    /// Sets the idle power of a domain from the next step on.
    pub fn set_idle(&mut self, domain: usize, idle: Option<Milliwatts>) {
        if let Some(account) = self.accounts.get_mut(domain) {
            account.idle = idle;
        }
    }

    /// Gives a slot to a pod, or to nobody, from the next step on.
    pub fn set_owner(&mut self, slot: &str, holder: Option<String>) {
        match holder {
            Some(holder) => self.owners.insert(slot.to_owned(), holder),
            None => self.owners.remove(slot),
        };
    }

    /// UID of the pod that holds a slot.
    #[must_use]
    pub fn owner(&self, slot: &str) -> Option<&str> {
        self.owners.get(slot).map(String::as_str)
    }

    /// Slots with the UIDs of the pods that hold them.
    pub fn owners(&self) -> impl Iterator<Item = (&str, &str)> {
        self.owners.iter().map(|(slot, holder)| (slot.as_str(), holder.as_str()))
    }

    /// Forgets a pod that is gone; what it used remains in the books.
    pub fn forget(&mut self, holder: &str) {
        self.owners.retain(|_, owner| owner != holder);
        for account in &mut self.accounts {
            if let Some(charge) = account.books.holders.remove(holder) {
                account.books.departed += charge.net;
            }
        }
    }

    /// The counter of a domain lost its total: windows that are open now cannot tell this domain any more.
    pub fn lost(&mut self, domain: usize, why: String) {
        if let Some(account) = self.accounts.get_mut(domain) {
            account.breaks += 1;
            account.why = why;
            account.last = None;
        }
    }

    /// Accounts for the time since the last step. `totals` are the counters' totals in microjoules, in the order of the
    /// domains; a domain without a reading is accounted for when it has one again. Without CPU times nothing is divided
    /// now, and everything in the next step that has them.
    pub fn step(&mut self, at: Duration, totals: &[Option<u64>], cpu: Option<&Arc<CpuTimes>>) {
        let Some(cpu) = cpu else { return };
        // What is not divided by CPU time keeps none: it would be written with each such domain.
        let none = Arc::default();
        for (account, total) in self.accounts.iter_mut().zip(totals) {
            let Some(total) = *total else { continue };
            let of_account = if matches!(account.domain.division, Division::CpuTime { .. }) { cpu } else { &none };
            let last = account.last.replace(Last { at, total, cpu: Arc::clone(of_account) });
            let Some(last) = last else { continue };
            let moved = total.saturating_sub(last.total);
            let power = account.idle.unwrap_or_default();
            let idle = power.over(at.saturating_sub(last.at)).0.min(moved);
            account.books.book(&account.domain, &self.owners, moved, idle, &last.cpu, cpu);
        }
    }

    /// Whether a pod holds a slot of a domain, and so is charged with idle energy.
    #[must_use]
    pub fn holds(&self, domain: &Domain, holder: &str) -> bool {
        domain.part_of(holder, &self.owners).0 > 0
    }

    /// Whether anybody holds a slot of a domain.
    #[must_use]
    pub fn is_held(&self, domain: &Domain) -> bool {
        domain.slots().any(|slot| self.owners.contains_key(slot))
    }
}

impl Domain {
    /// The slots whose holders are charged with its idle energy.
    pub fn slots(&self) -> impl Iterator<Item = &str> {
        let (one, several): (_, &[Share]) = match &self.division {
            Division::Slices(shares) => (None, shares),
            Division::CpuTime { .. } | Division::Whole => (Some(self.slot.as_str()), &[]),
        };
        one.into_iter().chain(several.iter().map(|share| share.slot.as_str()))
    }

    /// The part of the domain whose slots a pod holds: so many of so many.
    fn part_of(&self, holder: &str, owners: &BTreeMap<String, String>) -> (u64, u64) {
        let held = |slot: &str| owners.get(slot).is_some_and(|owner| owner == holder);
        match &self.division {
            Division::Slices(shares) => {
                let own = shares.iter().filter(|share| held(&share.slot)).map(|share| share.slices).sum();
                (own, shares.iter().map(|share| share.slices).sum::<u64>().max(1))
            }
            Division::CpuTime { .. } | Division::Whole => (u64::from(held(&self.slot)), 1),
        }
    }
}

impl Books {
    fn book(
        &mut self,
        domain: &Domain,
        owners: &BTreeMap<String, String>,
        moved: u64,
        idle: u64,
        before: &CpuTimes,
        now: &CpuTimes,
    ) {
        let dynamic = moved - idle;
        self.moved += moved;
        self.idle += idle;
        let owner = owners.get(&domain.slot);
        if let Some(owner) = owner {
            self.charge(owner).idle += idle;
        }
        match (&domain.division, owner) {
            (Division::Whole, Some(owner)) => self.charge(owner).net += dynamic,
            (Division::Whole, None) => self.system += dynamic,
            (Division::Slices(shares), _) => self.book_slices(shares, owners, dynamic, idle),
            (&Division::CpuTime { package }, _) => {
                let used = |now: &PackageTimes, before: &PackageTimes| {
                    let at = |times: &PackageTimes| times.get(package).copied().unwrap_or(0);
                    at(now).saturating_sub(at(before))
                };
                let holders: Vec<(&String, u64)> = now
                    .holders
                    .iter()
                    .filter_map(|(uid, times)| Some((uid, used(times, before.holders.get(uid)?))))
                    .collect();
                let held: u64 = holders.iter().map(|(_, used)| used).sum();
                let pods = now.pods.as_ref().zip(before.pods.as_ref()).map_or(0, |(now, before)| used(now, before));
                let others = pods.saturating_sub(held);
                let weights: Vec<u64> = holders.iter().map(|(_, used)| *used).chain([others]).collect();
                let (parts, system) = divide(dynamic, &weights, used(&now.node, &before.node));
                for ((uid, _), part) in holders.iter().zip(&parts) {
                    if *part > 0 {
                        self.charge(uid).net += part;
                    }
                }
                self.other_pods += parts.last().copied().unwrap_or(0);
                self.system += system;
            }
        }
    }

    /// Dynamic energy goes to those who hold slots, by their slices; without any, to the system. Of idle energy each pays for
    /// its slices of all: what belongs to slots that nobody holds is charged to nobody.
    fn book_slices(&mut self, shares: &[Share], owners: &BTreeMap<String, String>, dynamic: u64, idle: u64) {
        let held: Vec<(&String, u64)> =
            shares.iter().filter_map(|share| Some((owners.get(&share.slot)?, share.slices))).collect();
        let weights: Vec<u64> = held.iter().map(|(_, slices)| *slices).collect();
        let all: u64 = shares.iter().map(|share| share.slices).sum();
        let (net, system) = divide(dynamic, &weights, weights.iter().sum());
        let (of_idle, _) = divide(idle, &weights, all);
        for ((owner, _), (net, idle)) in held.iter().zip(net.iter().zip(&of_idle)) {
            let charge = self.charge(owner);
            charge.net += net;
            charge.idle += idle;
        }
        self.system += system;
    }

    fn charge(&mut self, holder: &str) -> &mut Charge {
        if !self.holders.contains_key(holder) {
            self.holders.insert(holder.to_owned(), Charge::default());
        }
        self.holders.get_mut(holder).expect("inserted above")
    }
}

/// A charge as energy.
impl Charge {
    /// Net and idle together.
    #[must_use]
    pub fn gross(self) -> Microjoules {
        Microjoules(self.net).plus(Microjoules(self.idle))
    }
}

#[cfg(test)]
mod tests;
