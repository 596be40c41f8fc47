//! The lines that a guest prints, and what they say.
//!
//! The format is that of the built-in guests (`guest-tests/guests`); a kernel that prints the same lines is measured
//! just as well. Nothing here trusts the guest: a line that starts like one of ours and does not parse is
//! [`Line::Garbled`], which no verified run contains.

/// What one line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    /// `R ready ws <bytes> tsc_khz <n> vcpus <n>`: every page is initialised, the first period begins.
    Ready(Ready),
    /// `P <period> visits <n> maxgap_us <n> bad <n> h: <bucket>:<count> …`.
    Period(Period),
    /// `G <period> visits <n> t: <bucket>:<count> …`: how long the visits of the period just told took by themselves.
    Times(Times),
    /// `V <period> cpu <i> visits <n> maxgap_us <n>`: one further vCPU in the period just told.
    Vcpu(VcpuPeriod),
    /// `B …`: a visit found what it had not written.
    Corrupt(String),
    /// `E …` or `X …`: the guest could not start, or died.
    Died(String),
    /// It starts like one of the lines above and is none.
    Garbled(String),
    /// Anything else: a firmware's banner, a kernel's messages.
    Other,
}

/// What a guest says of itself before it starts to work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ready {
    /// Bytes that it visits.
    pub working_set: u64,
    /// Its TSC's frequency as it knows it.
    pub tsc_khz: u64,
    /// vCPUs that work.
    pub vcpus: u64,
}

/// One period of the whole guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Period {
    /// Counted from 0.
    pub number: u64,
    /// Visits of all vCPUs in this period.
    pub visits: u64,
    /// The longest time between two visits of one vCPU that ended in this period, in microseconds of the guest's TSC.
    pub max_gap_us: u64,
    /// Corrupt visits since the guest's start.
    pub bad: u64,
    /// How many gaps took at least 2^bucket TSC ticks and less than twice that.
    pub gaps: Vec<(u8, u64)>,
}

/// How long the visits of a period took by themselves: less what the guest waited and printed between them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Times {
    /// The period's number.
    pub number: u64,
    /// How many took so long, in eight buckets an octave of TSC ticks: bucket 8·o + s begins at 2^o·(1 + s/8).
    pub buckets: Vec<(u16, u64)>,
}

/// One period of one vCPU. The first vCPU has no line of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuPeriod {
    /// The period's number.
    pub number: u64,
    /// The vCPU's, from 1.
    pub cpu: u64,
    /// Its visits.
    pub visits: u64,
    /// Its longest gap, in microseconds.
    pub max_gap_us: u64,
}

impl Line {
    /// Reads one line, without its line feed. Bytes that are no UTF-8 make it garbled or other.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let text = text.trim_end_matches(['\r', '\n']);
        let garbled = || Self::Garbled(text.to_owned());
        let mut words = text.split(' ');
        match words.next() {
            Some("R") => ready(words).map_or_else(garbled, Self::Ready),
            Some("P") => period(words).map_or_else(garbled, Self::Period),
            Some("G") => times(words).map_or_else(garbled, Self::Times),
            Some("V") => vcpu(words).map_or_else(garbled, Self::Vcpu),
            Some("B") => Self::Corrupt(text.to_owned()),
            Some("E" | "X") => Self::Died(text.to_owned()),
            _ => Self::Other,
        }
    }
}

/// The number after the word `name`.
fn field<'a>(words: &mut impl Iterator<Item = &'a str>, name: &str) -> Option<u64> {
    (words.next()? == name).then_some(())?;
    number(words.next()?)
}

/// Digits only: `u64::from_str` takes a plus sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn ready<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Ready> {
    (words.next()? == "ready").then_some(())?;
    let ready = Ready {
        working_set: field(&mut words, "ws")?,
        tsc_khz: field(&mut words, "tsc_khz")?,
        vcpus: field(&mut words, "vcpus")?,
    };
    words.next().is_none().then_some(ready)
}

fn period<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Period> {
    let mut period = Period {
        number: number(words.next()?)?,
        visits: field(&mut words, "visits")?,
        max_gap_us: field(&mut words, "maxgap_us")?,
        bad: field(&mut words, "bad")?,
        gaps: Vec::new(),
    };
    (words.next()? == "h:").then_some(())?;
    for (bucket, count) in histogram(words, 64, period.visits)? {
        period.gaps.push((u8::try_from(bucket).ok()?, count));
    }
    Some(period)
}

fn times<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<Times> {
    let period = number(words.next()?)?;
    let visits = field(&mut words, "visits")?;
    (words.next()? == "t:").then_some(())?;
    Some(Times { number: period, buckets: histogram(words, 512, visits)? })
}

/// `<bucket>:<count> …` of less than `buckets` buckets. Every visit is in one: a line that lost or gained a byte does not add
/// up to `visits`, so the sum is its checksum.
fn histogram<'a>(words: impl Iterator<Item = &'a str>, buckets: u16, visits: u64) -> Option<Vec<(u16, u64)>> {
    let mut found = Vec::new();
    for word in words.filter(|word| !word.is_empty()) {
        let (bucket, count) = word.split_once(':')?;
        let bucket = u16::try_from(number(bucket)?).ok().filter(|bucket| *bucket < buckets)?;
        found.push((bucket, number(count)?));
    }
    let counted = found.iter().try_fold(0_u64, |sum, (_, count)| sum.checked_add(*count))?;
    (counted == visits).then_some(found)
}

fn vcpu<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<VcpuPeriod> {
    let vcpu = VcpuPeriod {
        number: number(words.next()?)?,
        cpu: field(&mut words, "cpu")?,
        visits: field(&mut words, "visits")?,
        max_gap_us: field(&mut words, "maxgap_us")?,
    };
    words.next().is_none().then_some(vcpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn garbled(text: &str) -> bool {
        matches!(Line::parse(text.as_bytes()), Line::Garbled(_))
    }

    #[test]
    fn every_kind_of_line_is_read() {
        assert_eq!(
            Line::parse(b"R ready ws 268435456 tsc_khz 2445406 vcpus 2"),
            Line::Ready(Ready { working_set: 268_435_456, tsc_khz: 2_445_406, vcpus: 2 })
        );
        assert_eq!(
            Line::parse(b"P 3 visits 12 maxgap_us 450 bad 0 h: 9:10 11:2\r"),
            Line::Period(Period { number: 3, visits: 12, max_gap_us: 450, bad: 0, gaps: vec![(9, 10), (11, 2)] })
        );
        assert_eq!(
            Line::parse(b"V 3 cpu 1 visits 7 maxgap_us 5"),
            Line::Vcpu(VcpuPeriod { number: 3, cpu: 1, visits: 7, max_gap_us: 5 })
        );
        assert_eq!(
            Line::parse(b"G 3 visits 12 t: 130:10 511:2"),
            Line::Times(Times { number: 3, buckets: vec![(130, 10), (511, 2)] })
        );
        assert!(matches!(Line::parse(b"B page 7 counter 1 expected 2"), Line::Corrupt(_)));
        assert!(matches!(Line::parse(b"E parameter \"x\": unknown"), Line::Died(_)));
        assert_eq!(Line::parse(b"SeaBIOS (version 1.16)"), Line::Other);
        assert_eq!(Line::parse(b""), Line::Other);
    }

    #[test]
    fn a_period_without_visits_is_a_period() {
        let line = Line::parse(b"P 3 visits 0 maxgap_us 0 bad 0 h:");
        assert!(matches!(line, Line::Period(Period { visits: 0, .. })), "{line:?}");
    }

    #[test]
    fn whatever_is_cut_or_damaged_is_garbled() {
        let whole = "P 3 visits 12 maxgap_us 450 bad 0 h: 9:10 11:2";
        assert!(!garbled(whole));
        for cut in 1..whole.len() {
            assert!(garbled(&whole[..cut]), "{}", &whole[..cut]);
        }
        assert!(garbled("P 3 visits 12 maxgap_us 450 bad 0 h: 9:10 11:3"), "the gaps do not add up");
        let times = "G 3 visits 12 t: 130:10 131:2";
        assert!(!garbled(times));
        for cut in 1..times.len() {
            assert!(garbled(&times[..cut]), "{}", &times[..cut]);
        }
        assert!(garbled("G 3 visits 1 t: 512:1") && garbled("G 3 visits 2 t: 5:1"));
        assert!(garbled("P +3 visits 0 maxgap_us 0 bad 0 h:"));
        assert!(garbled("P 3 visits 99999999999999999999 maxgap_us 0 bad 0 h:"));
        assert!(garbled("P 3 visits 1 maxgap_us 0 bad 0 h: 64:1"));
        assert!(garbled("V 3 cpu 1 visits 7 maxgap_us 5 6"));
        assert!(garbled("R ready ws 1 tsc_khz 2"));
        assert!(matches!(Line::parse(b"P \xff\xfe"), Line::Garbled(_)));
    }
}
