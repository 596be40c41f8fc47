//! Which parts an order is put together of, and their names on a command line.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Where the pages known to be wanted stand: the first pages of the state, then the hottest written ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hints {
    /// Before everything else.
    First,
    /// In turn with what the faults ask for.
    InTurn,
}

/// What a fault says of its neighbours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Near {
    /// Nothing.
    None,
    /// The chunk around each of the latest faults, the oldest of them first.
    Around,
    /// The same, the latest first.
    Latest,
    /// Pages on both sides of several faults, more with each further fault near them.
    Bubbles,
}

/// A way to order the push.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// When pages known to be wanted go.
    pub hints: Hints,
    /// What goes after a fault that follows no trend.
    pub near: Near,
    /// Follow what most of the latest faults have in common: their distance.
    pub trend: bool,
    /// The sweep goes on from the latest fault, and not from the start of RAM.
    pub aim: bool,
}

/// A name of no policy.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{0}` is no push order: join some of around, latest, bubbles, trend, aim, in-turn with `+`, or write sweep")]
pub struct PolicyError(String);

impl Policy {
    /// In the order of the addresses, whatever is asked for.
    pub const SWEEP: Self = Self { hints: Hints::First, near: Near::None, trend: false, aim: false };
    /// What the replayed traces speak for: docs/prefetch.md.
    pub const CHOSEN: Self = Self { hints: Hints::First, near: Near::Latest, trend: false, aim: true };
    /// Those that docs/prefetch.md compares.
    pub const COMPARED: [Self; 10] = [
        Self::SWEEP,
        Self { near: Near::Around, ..Self::SWEEP },
        Self { near: Near::Latest, ..Self::SWEEP },
        Self { near: Near::Bubbles, ..Self::SWEEP },
        Self { trend: true, ..Self::SWEEP },
        Self { aim: true, ..Self::SWEEP },
        Self { near: Near::Latest, aim: true, ..Self::SWEEP },
        Self { trend: true, near: Near::Latest, aim: true, ..Self::SWEEP },
        Self { trend: true, near: Near::Bubbles, aim: true, ..Self::SWEEP },
        Self { trend: true, near: Near::Bubbles, aim: true, hints: Hints::InTurn },
    ];
}

impl Default for Policy {
    fn default() -> Self {
        Self::CHOSEN
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let near = match self.near {
            Near::None => "",
            Near::Around => "around",
            Near::Latest => "latest",
            Near::Bubbles => "bubbles",
        };
        let parts = [
            if self.trend { "trend" } else { "" },
            near,
            if self.aim { "aim" } else { "" },
            if self.hints == Hints::InTurn { "in-turn" } else { "" },
        ];
        let name = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("+");
        f.pad(if name.is_empty() { "sweep" } else { &name })
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let mut policy = Self::SWEEP;
        for part in text.split('+') {
            let (near, trend, aim, turn) = (policy.near, policy.trend, policy.aim, policy.hints);
            policy = match part {
                "sweep" => Self { near, trend, aim, hints: turn },
                "around" if near == Near::None => Self { near: Near::Around, ..policy },
                "latest" if near == Near::None => Self { near: Near::Latest, ..policy },
                "bubbles" if near == Near::None => Self { near: Near::Bubbles, ..policy },
                "trend" => Self { trend: true, ..policy },
                "aim" => Self { aim: true, ..policy },
                "in-turn" => Self { hints: Hints::InTurn, ..policy },
                _ => return Err(PolicyError(text.to_owned())),
            };
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_has_a_name_of_its_own() {
        let names: Vec<_> = Policy::COMPARED.iter().map(ToString::to_string).collect();
        for (policy, name) in Policy::COMPARED.iter().zip(&names) {
            assert_eq!(name.parse(), Ok(*policy), "{name}");
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        }
    }

    #[test]
    fn what_names_none_is_refused() {
        for name in ["", "round", "around+latest", "trend++aim"] {
            assert_eq!(name.parse::<Policy>(), Err(PolicyError(name.to_owned())));
        }
    }
}
