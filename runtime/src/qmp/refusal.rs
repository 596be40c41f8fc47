//! Why a command was not carried out, as QMP says it.

use std::fmt;

use serde_json::{Value, json};

/// QMP's classes of error that exist here. Clients should only tell `CommandNotFound` from the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// The command does not exist, or not yet: before negotiation only `qmp_capabilities` does.
    CommandNotFound,
    /// Anything else.
    Generic,
}

/// An error reply's contents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Its class.
    pub class: Class,
    /// The sentence for a human.
    pub desc: String,
}

impl Refusal {
    /// A `GenericError` with this sentence.
    pub fn generic(desc: impl fmt::Display) -> Self {
        Self { class: Class::Generic, desc: desc.to_string() }
    }

    /// A `CommandNotFound` with this sentence.
    pub fn not_found(desc: impl fmt::Display) -> Self {
        Self { class: Class::CommandNotFound, desc: desc.to_string() }
    }

    /// The value of an enumeration that has no such value.
    pub fn not_accepted(name: &str, value: &str) -> Self {
        Self::generic(format_args!("Parameter '{name}' does not accept value '{value}'"))
    }

    /// As it stands in a reply under `error`.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let class = match self.class {
            Class::CommandNotFound => "CommandNotFound",
            Class::Generic => "GenericError",
        };
        json!({ "class": class, "desc": self.desc })
    }
}
