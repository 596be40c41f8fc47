//! What the command line asks for.

use core::fmt;

use crate::cpu::MAX_CPUS;
use crate::pages::PAGE_BYTES;

/// A guest's parameters; the crate's page lists them.
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// Working set, in pages.
    pub pages: usize,
    /// vCPUs that share it.
    pub vcpus: usize,
    /// Least time between two visits of a vCPU, in ns.
    pub pace_ns: u64,
    /// Time between two reports, in ms.
    pub period_ms: u64,
    /// Of all random choices and page contents.
    pub seed: u64,
    /// Frequency of the TSC in kHz, or 0.
    pub tsc_khz: u64,
    /// Percentage of pages that are hot.
    pub hot: u64,
    /// Percentage of visits that go to them.
    pub hot_visits: u64,
    /// Percentage of visits that write, for those who do not always: the reader's 5 or the hot set's 100 unless it is given.
    pub writes: Option<u64>,
    /// Whether the times of visits are reported too.
    pub fine: bool,
    /// Periods after which to end, or 0.
    pub stop: u64,
    /// Visit before which vCPU 0 damages the page, or 0.
    pub corrupt: u64,
}

/// A parameter that is unknown, or whose value is not one.
pub struct Malformed<'a> {
    parameter: &'a [u8],
    wanted: &'static str,
}

impl fmt::Display for Malformed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parameter \"{}\": {}", self.parameter.escape_ascii(), self.wanted)
    }
}

/// Every vCPU has at least so many pages, so that each workload finds enough for what it does.
const LEAST_PAGES: usize = 64;
const PACE_MAX_NS: u64 = 60_000_000_000;
const PERIOD_MS: core::ops::RangeInclusive<u64> = 10..=3_600_000;

impl Params {
    /// Reads a command line; `pace_ns` is what `pace` defaults to.
    ///
    /// # Errors
    /// At the first parameter that is unknown or malformed.
    pub fn parse(line: &[u8], pace_ns: u64) -> Result<Self, Malformed<'_>> {
        let mut it = Self {
            pages: (256 << 20) / PAGE_BYTES,
            vcpus: 1,
            pace_ns,
            period_ms: 1000,
            seed: 1,
            tsc_khz: 0,
            hot: 10,
            hot_visits: 90,
            writes: None,
            fine: false,
            stop: 0,
            corrupt: 0,
        };
        for parameter in line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()) {
            it.set(parameter).map_err(|wanted| Malformed { parameter, wanted })?;
        }
        if it.pages < LEAST_PAGES * it.vcpus {
            return Err(Malformed { parameter: b"ws", wanted: "at least 256K for each vCPU" });
        }
        Ok(it)
    }

    fn set(&mut self, parameter: &[u8]) -> Result<(), &'static str> {
        const NUMBER: &str = "not a number";
        const PERCENTAGE: &str = "a percentage from 0 to 100";
        let equals = parameter.iter().position(|&b| b == b'=').ok_or("unknown; parameters read name=value")?;
        let (name, value) = (&parameter[..equals], &parameter[equals + 1..]);
        let number = || decimal(value).ok_or(NUMBER);
        let percentage = || decimal(value).filter(|n| *n <= 100).ok_or(PERCENTAGE);
        match name {
            b"ws" => {
                const WANTED: &str = "bytes, a multiple of 4096; K, M and G are understood";
                let bytes = bytes(value).and_then(|n| usize::try_from(n).ok()).ok_or(WANTED)?;
                if bytes % PAGE_BYTES != 0 {
                    return Err(WANTED);
                }
                self.pages = bytes / PAGE_BYTES;
            }
            b"vcpus" => {
                self.vcpus = decimal(value)
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| (1..=MAX_CPUS).contains(n))
                    .ok_or("from 1 to 16")?;
            }
            b"pace" => self.pace_ns = decimal(value).filter(|n| *n <= PACE_MAX_NS).ok_or("ns, at most 60 s")?,
            b"period" => {
                self.period_ms = decimal(value).filter(|n| PERIOD_MS.contains(n)).ok_or("ms, from 10 to 3600000")?;
            }
            b"seed" => self.seed = number()?,
            b"tsc_khz" => {
                // Up to 10 GHz: the arithmetic of times relies on a bound.
                self.tsc_khz = decimal(value).filter(|n| *n <= 10_000_000).ok_or("kHz, at most 10000000")?;
            }
            b"hot" => self.hot = percentage()?,
            b"hotvisits" => self.hot_visits = percentage()?,
            b"writes" => self.writes = Some(percentage()?),
            b"gaps" => {
                self.fine = match value {
                    b"fine" => true,
                    b"octaves" => false,
                    _ => return Err("fine or octaves"),
                };
            }
            b"stop" => self.stop = number()?,
            b"corrupt" => self.corrupt = number()?,
            _ => return Err("unknown"),
        }
        Ok(())
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |sum, &digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

fn bytes(text: &[u8]) -> Option<u64> {
    let (number, shift) = match text.split_last()? {
        (b'K', number) => (number, 10),
        (b'M', number) => (number, 20),
        (b'G', number) => (number, 30),
        _ => (text, 0),
    };
    decimal(number)?.checked_mul(1 << shift)
}
