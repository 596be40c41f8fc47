//! One parameter as a client gave it, and QEMU's words for what is wrong with it.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::Value;

use super::refusal::Refusal;

/// A name and a value.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// The parameter's name.
    pub name: &'a str,
    /// What it is to be.
    pub value: &'a Value,
}

impl Given<'_> {
    /// Any whole number from 0 on.
    ///
    /// # Errors
    /// When it is none.
    pub fn uint64(&self) -> Result<u64, Refusal> {
        self.value.as_u64().ok_or_else(|| self.expects("uint64"))
    }

    /// A small number; QEMU calls its bounds "a value between".
    ///
    /// # Errors
    /// When it is none, or out of bounds.
    pub fn between(&self, bounds: RangeInclusive<u8>) -> Result<u8, Refusal> {
        let value = self.uint8()?;
        if bounds.contains(&value) {
            return Ok(value);
        }
        Err(self.expects(format_args!("a value between {} and {}", bounds.start(), bounds.end())))
    }

    /// A share that neither is nothing nor everything.
    ///
    /// # Errors
    /// When it is none.
    pub fn percent(&self) -> Result<u8, Refusal> {
        let value = self.uint8()?;
        if (1..=99).contains(&value) {
            return Ok(value);
        }
        Err(self.expects("an integer in the range of 1 to 99"))
    }

    /// A number within bounds, which an error names with `unit` behind them.
    ///
    /// # Errors
    /// When it is none, or out of bounds.
    pub fn within(&self, bounds: RangeInclusive<u64>, unit: &str) -> Result<u64, Refusal> {
        let value = self.uint64()?;
        if bounds.contains(&value) {
            return Ok(value);
        }
        Err(self.expects(format_args!("an integer in the range of {} to {}{unit}", bounds.start(), bounds.end())))
    }

    /// A truth value.
    ///
    /// # Errors
    /// When it is none.
    pub fn boolean(&self) -> Result<bool, Refusal> {
        self.value.as_bool().ok_or_else(|| self.mistyped("boolean"))
    }

    /// A text; null is QEMU's way to clear one.
    ///
    /// # Errors
    /// When it is none.
    pub fn string(&self) -> Result<String, Refusal> {
        if self.value.is_null() {
            return Ok(String::new());
        }
        self.value.as_str().map(str::to_owned).ok_or_else(|| self.mistyped("string"))
    }

    /// One of these names.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn one_of<T: Copy>(&self, names: &[(&str, T)]) -> Result<T, Refusal> {
        let text = self.value.as_str().ok_or_else(|| self.mistyped("string"))?;
        let found = names.iter().find(|(name, _)| *name == text);
        found.map(|(_, value)| *value).ok_or_else(|| Refusal::not_accepted(self.name, text))
    }

    /// The refusal of a value that is not `what`.
    pub fn expects(&self, what: impl fmt::Display) -> Refusal {
        Refusal::generic(format_args!("Parameter '{}' expects {what}", self.name))
    }

    /// The refusal of a value that QEMU knows and this machine has not.
    pub fn cannot(&self, reason: impl fmt::Display) -> Refusal {
        Refusal::generic(format_args!("Parameter '{}' cannot be set to {}: {reason}", self.name, self.value))
    }

    fn uint8(&self) -> Result<u8, Refusal> {
        let small = self.value.as_u64().and_then(|value| u8::try_from(value).ok());
        small.ok_or_else(|| self.expects("uint8_t"))
    }

    fn mistyped(&self, wanted: &str) -> Refusal {
        Refusal::generic(format_args!("Invalid parameter type for '{}', expected: {wanted}", self.name))
    }
}
