//! What a built-in guest says, read strictly: whatever is not as its page describes it is a problem.

/// What a guest has said so far.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GuestLog {
    /// vCPUs that it works with, once it is ready.
    pub vcpus: Option<usize>,
    /// Its periods, in order.
    pub periods: Vec<Period>,
    /// All that is wrong.
    pub problems: Vec<String>,
    rest: Vec<u8>,
}

/// A period.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Period {
    /// Visits of all vCPUs.
    pub visits: u64,
    /// The longest gap that ended in it, in µs.
    pub max_gap_us: u64,
    /// Visits of each vCPU but the first. Complete once the next period has begun.
    pub others: Vec<u64>,
}

impl GuestLog {
    /// Takes more of what it says.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]).into_owned();
            if let Err(problem) = self.line(&line) {
                self.problems.push(format!("{problem} in `{line}` after {} periods", self.periods.len()));
            }
        }
    }

    /// Visits of vCPU `cpu` in the periods from number `from` on.
    pub fn visits_since(&self, from: usize, cpu: usize) -> u64 {
        let periods = self.periods.get(from..).unwrap_or_default();
        periods
            .iter()
            .map(|period| match cpu {
                0 => period.visits - period.others.iter().sum::<u64>().min(period.visits),
                other => period.others.get(other - 1).copied().unwrap_or(0),
            })
            .sum()
    }

    /// Whether every vCPU has visited pages in the periods from number `from` on.
    pub fn all_alive_since(&self, from: usize) -> bool {
        self.vcpus.is_some_and(|vcpus| (0..vcpus).all(|cpu| self.visits_since(from, cpu) > 0))
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["R", "ready", "ws", ws, "tsc_khz", khz, "vcpus", vcpus] => {
                number(ws)?;
                number(khz)?;
                if self.vcpus.is_some() {
                    return Err("the guest started twice".to_owned());
                }
                self.vcpus = usize::try_from(number(vcpus)?).ok();
                Ok(())
            }
            ["P", period, "visits", visits, "maxgap_us", gap, "bad", bad, "h:", ref gaps @ ..] => {
                let visits = number(visits)?;
                let expected = self.periods.len() as u64;
                let complete = self.previous_is_complete();
                self.periods.push(Period { visits, max_gap_us: number(gap)?, others: Vec::new() });
                if number(period)? != expected {
                    return Err(format!("period {expected} was to come"));
                }
                if number(bad)? != 0 {
                    return Err("corrupt pages".to_owned());
                }
                let mut sum = 0;
                for gap in gaps {
                    let (bucket, count) = gap.split_once(':').ok_or("a malformed histogram")?;
                    number(bucket)?;
                    sum += number(count)?;
                }
                if sum != visits {
                    return Err(format!("a histogram of {sum} gaps"));
                }
                complete
            }
            ["V", period, "cpu", cpu, "visits", visits, "maxgap_us", gap] => {
                number(gap)?;
                let last = self.periods.len().checked_sub(1).ok_or("no period before it")?;
                let seen = self.periods[last].others.len() as u64;
                if number(period)? != last as u64 || number(cpu)? != seen + 1 {
                    return Err("a vCPU out of turn".to_owned());
                }
                self.periods[last].others.push(number(visits)?);
                Ok(())
            }
            _ => Err("not a line of a sound guest".to_owned()),
        }
    }

    fn previous_is_complete(&self) -> Result<(), String> {
        let Some(last) = self.periods.last() else {
            return self.vcpus.map(drop).ok_or_else(|| "a period before the guest was ready".to_owned());
        };
        if self.vcpus == Some(last.others.len() + 1) { Ok(()) } else { Err("a vCPU is missing before it".to_owned()) }
    }
}

fn number(word: &str) -> Result<u64, String> {
    // `parse` would take a plus sign too.
    if word.bytes().all(|byte| byte.is_ascii_digit()) {
        word.parse().map_err(|_| format!("`{word}` is no number"))
    } else {
        Err(format!("`{word}` is no number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = "R ready ws 4096 tsc_khz 5 vcpus 2\nP 0 visits 5 maxgap_us 9 bad 0 h: 3:4 10:1\nV 0 cpu 1 visits 2 maxgap_us 3\n";

    fn read(text: &str) -> GuestLog {
        let mut log = GuestLog::default();
        // In two pieces, as it may come.
        let (one, two) = text.as_bytes().split_at(text.len() / 2);
        log.feed(one);
        log.feed(two);
        log
    }

    #[test]
    fn a_sound_guest_has_no_problems() {
        let log = read(&format!("{START}P 1 visits 0 maxgap_us 0 bad 0 h:\nV 1 cpu 1 visits 0 maxgap_us 0\nP 2 vis"));
        assert_eq!(log.problems, Vec::<String>::new());
        assert_eq!((log.vcpus, log.periods.len()), (Some(2), 2));
        assert_eq!((log.visits_since(0, 0), log.visits_since(0, 1)), (3, 2));
        assert!(log.all_alive_since(0) && !log.all_alive_since(1));
    }

    #[test]
    fn every_flaw_is_a_problem() {
        for flaw in [
            "P 2 visits 0 maxgap_us 0 bad 0 h:",
            "P 0 visits 0 maxgap_us 0 bad 0 h:",
            "P 1 visits 0 maxgap_us 0 bad 1 h:",
            "P 1 visits 2 maxgap_us 0 bad 0 h: 1:1",
            "P 1 visits -2 maxgap_us 0 bad 0 h: 1:1",
            "P 1 visits 0 maxgap_us 0 bad 0 h:\nP 2 visits 0 maxgap_us 0 bad 0 h:",
            "V 0 cpu 1 visits 2 maxgap_us 3",
            "B page 5 counter 1 expected 2 word 3 got 0x0 expected 0x1",
            "X panic",
            "E no memory",
            "R ready ws 4096 tsc_khz 5 vcpus 2",
            "P 1 visits 0 maxgap_us 0 ba",
            "",
        ] {
            assert_eq!(read(&format!("{START}{flaw}\n")).problems.len(), 1, "{flaw}");
        }
    }
}
