//! How fast a lane carries bytes.

/// Bytes that make an observation: more than sockets' buffers swallow at once, or a lane would look as fast as memory.
const WINDOW_BYTES: f64 = (1 << 20) as f64;

/// Or so much time, so that a slow link is noticed soon.
const WINDOW_NS: f64 = 20e6;

/// Weight of an observation that is slower than what was believed, and of one that is faster. A lane that encodes for
/// long never fills its link, and then looks faster than it is: so belief in a faster link grows slowly.
const SLOWER: f64 = 0.5;
const FASTER: f64 = 0.125;

/// The time that a byte takes on a lane, measured.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Link {
    /// Nanoseconds a byte, `None` until something was sent.
    ns_per_byte: Option<f64>,
    /// What is not yet an observation.
    bytes: f64,
    ns: f64,
    /// What was believed when the last change was told.
    told: f64,
}

impl Link {
    /// So many bytes took so long. True where the link is now at least twice as fast or slow as when that was last so.
    pub fn note(&mut self, bytes: f64, ns: f64) -> bool {
        self.bytes += bytes;
        self.ns += ns;
        if self.bytes <= 0.0 {
            return false;
        }
        let seen = self.ns / self.bytes;
        let believed = match self.ns_per_byte {
            // Rather a rough idea than none. It is made of the same bytes until they are an observation.
            None => seen,
            Some(_) if self.bytes < WINDOW_BYTES && self.ns < WINDOW_NS => return false,
            Some(before) => before + (seen - before) * if seen > before { SLOWER } else { FASTER },
        };
        (self.ns_per_byte, self.bytes, self.ns) = (Some(believed), 0.0, 0.0);
        let changed = believed > 2.0 * self.told || believed * 2.0 < self.told;
        if changed {
            self.told = believed;
        }
        changed
    }

    pub const fn is_known(&self) -> bool {
        self.ns_per_byte.is_some()
    }

    /// Nanoseconds that so many bytes take; 0 where nothing was sent yet.
    pub fn time(&self, bytes: f64) -> f64 {
        self.ns_per_byte.unwrap_or(0.0) * bytes
    }

    /// Bytes that go in so many nanoseconds.
    pub fn bytes_in(&self, ns: f64) -> f64 {
        match self.ns_per_byte {
            Some(each) if each > 0.0 => ns / each,
            _ => f64::INFINITY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1_048_576.0;

    #[test]
    fn the_first_bytes_give_an_idea() {
        let mut link = Link::default();
        assert!(!link.is_known() && link.time(4096.0) == 0.0);
        assert!(link.note(1000.0, 8000.0));
        assert_eq!((link.time(1000.0), link.bytes_in(80.0)), (8000.0, 10.0));
    }

    #[test]
    fn bursts_into_a_buffer_do_not_look_like_a_fast_link() {
        let mut link = Link::default();
        link.note(MIB, 8.0 * MIB);
        // Nine small frames that cost nothing, and one that waits for them all.
        for _ in 0..1000 {
            (0..9).for_each(|_| assert!(!link.note(10_000.0, 1000.0)));
            link.note(10_000.0, 791_000.0);
        }
        let each = link.time(1.0);
        assert!((7.0..9.5).contains(&each), "{each} ns a byte");
    }

    #[test]
    fn a_slower_link_is_believed_sooner_than_a_faster_one() {
        let mut link = Link::default();
        let mut notes = 0;
        link.note(MIB, MIB);
        while link.time(1.0) < 8.0 {
            link.note(MIB, 10.0 * MIB);
            notes += 1;
        }
        assert!(notes <= 4, "{notes}");
        (0..4).for_each(|_| _ = link.note(MIB, MIB));
        assert!(link.time(1.0) > 4.0, "a lane that does not fill its link looks fast");
        (0..60).for_each(|_| _ = link.note(MIB, MIB));
        assert!(link.time(1.0) < 1.1);
    }

    #[test]
    fn a_change_is_told_once() {
        let mut link = Link::default();
        assert!(link.note(MIB, MIB));
        let told = (0..20).filter(|_| link.note(MIB, 3.0 * MIB)).count();
        assert_eq!(told, 1);
    }
}
