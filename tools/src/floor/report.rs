//! What `switchover floor` found.

use serde::{Deserialize, Serialize};

use super::loaded_report::LoadedReport;
use super::percentiles::Percentiles;

/// What this machine can do at best: the parts that every remote fault has, each measured alone on an idle machine; and what
/// becomes of them beside a drain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FloorReport {
    /// A user thread touches a page; another thread maps it.
    pub user_fault: Ways,
    /// A KVM guest touches a page; a thread maps it.
    pub guest_fault: Ways,
    /// 16 bytes one way and 4 KiB back over TCP on the loopback interface.
    pub tcp: Ways,
    /// The same over a unix socket.
    pub unix: Ways,
    /// F: a fault and a request/response, percentile by percentile. It is a yardstick, not a distribution: the sum of
    /// two 99th percentiles is more than the 99th percentile of the sum.
    pub sums: Vec<FloorSum>,
    /// A fault whose page is asked for over TCP before it is answered: both parts in one, and so a distribution. Of a guest, or
    /// of a user thread where there is no KVM.
    #[serde(default)]
    pub remote: Option<Ways>,
    /// The same beside a stream and a busy vCPU.
    #[serde(default)]
    pub loaded: Option<LoadedReport>,
}

/// One part measured with both ways of waiting.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ways {
    /// Whoever waits for the other side sleeps in the kernel.
    pub sleeping: Measured,
    /// Whoever waits asks again and again.
    pub spinning: Measured,
}

/// A measurement, or why there is none.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Measured {
    /// The round trips' percentiles.
    Round(Percentiles),
    /// It could not be measured.
    Missing {
        /// Why, in a sentence.
        unavailable: String,
    },
}

/// F for one link and one way of waiting.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FloorSum {
    /// `tcp` or `unix`.
    pub link: String,
    /// `sleeping` or `spinning`.
    pub way: String,
    /// Whose fault is in it: `guest`, or `user` where no guest could be measured.
    pub fault: String,
    /// Sum of the medians, in nanoseconds.
    pub p50_ns: u64,
    /// Sum of the 90th percentiles.
    pub p90_ns: u64,
    /// Sum of the 99th percentiles.
    pub p99_ns: u64,
    /// Sum of the 99.9th percentiles.
    #[serde(default)]
    pub p99_9_ns: u64,
}

impl FloorSum {
    /// Of a fault of `whose`, and a request over `link`.
    #[must_use]
    pub fn of(link: &str, way: &str, whose: &str, fault: &Percentiles, request: &Percentiles) -> Self {
        Self {
            link: link.to_owned(),
            way: way.to_owned(),
            fault: whose.to_owned(),
            p50_ns: fault.p50_ns + request.p50_ns,
            p90_ns: fault.p90_ns + request.p90_ns,
            p99_ns: fault.p99_ns + request.p99_ns,
            p99_9_ns: fault.p99_9_ns + request.p99_9_ns,
        }
    }
}

impl Measured {
    /// The percentiles, where there are any.
    #[must_use]
    pub const fn round(&self) -> Option<&Percentiles> {
        match self {
            Self::Round(percentiles) => Some(percentiles),
            Self::Missing { .. } => None,
        }
    }
}

impl FloorReport {
    /// Puts the four parts together and sums them up.
    #[must_use]
    pub fn new(user_fault: Ways, guest_fault: Ways, tcp: Ways, unix: Ways) -> Self {
        let mut sums = Vec::new();
        for (link, request) in [("tcp", &tcp), ("unix", &unix)] {
            for (way, guest, user, request) in [
                ("sleeping", &guest_fault.sleeping, &user_fault.sleeping, &request.sleeping),
                ("spinning", &guest_fault.spinning, &user_fault.spinning, &request.spinning),
            ] {
                let guest = guest.round().map(|fault| ("guest", fault));
                let fault = guest.or_else(|| user.round().map(|fault| ("user", fault)));
                if let (Some((whose, fault)), Some(request)) = (fault, request.round()) {
                    sums.push(FloorSum::of(link, way, whose, fault, request));
                }
            }
        }
        Self { user_fault, guest_fault, tcp, unix, sums, remote: None, loaded: None }
    }

    /// Every part by name and way of waiting, in the order in which they are shown.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, &'static str, &Measured); 8] {
        [
            ("fault of a user thread", "sleeping", &self.user_fault.sleeping),
            ("fault of a user thread", "spinning", &self.user_fault.spinning),
            ("fault of a KVM guest", "sleeping", &self.guest_fault.sleeping),
            ("fault of a KVM guest", "spinning", &self.guest_fault.spinning),
            ("4 KiB over TCP loopback", "sleeping", &self.tcp.sleeping),
            ("4 KiB over TCP loopback", "spinning", &self.tcp.spinning),
            ("4 KiB over a unix socket", "sleeping", &self.unix.sleeping),
            ("4 KiB over a unix socket", "spinning", &self.unix.spinning),
        ]
    }
}

/// A made-up report for tests of what shows one.
#[cfg(test)]
pub fn synthetic() -> FloorReport {
    let ways = |sleeping, spinning| Ways {
        sleeping: Measured::Round(synthetic_round(sleeping)),
        spinning: Measured::Round(synthetic_round(spinning)),
    };
    let mut report =
        FloorReport::new(ways(32_000, 18_000), ways(68_000, 37_000), ways(54_000, 7_000), ways(48_000, 5_600));
    report.remote = Some(ways(125_000, 46_000));
    report.loaded = Some(super::loaded_report::synthetic());
    report
}

/// Made-up percentiles around a median.
#[cfg(test)]
pub fn synthetic_round(p50_ns: u64) -> Percentiles {
    Percentiles {
        count: 4000,
        p50_ns,
        p90_ns: p50_ns * 5 / 4,
        p99_ns: p50_ns * 2,
        p99_9_ns: p50_ns * 4,
        max_ns: p50_ns * 9,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_take_the_guests_fault_and_fall_back_to_the_users() {
        let mut report = synthetic();
        let sum = &report.sums[0];
        assert_eq!((sum.link.as_str(), sum.way.as_str(), sum.fault.as_str()), ("tcp", "sleeping", "guest"));
        assert_eq!(sum.p50_ns, 68_000 + 54_000);
        report.guest_fault.sleeping = Measured::Missing { unavailable: "no /dev/kvm".to_owned() };
        let report = FloorReport::new(report.user_fault, report.guest_fault, report.tcp, report.unix);
        assert_eq!((report.sums[0].fault.as_str(), report.sums[0].p50_ns), ("user", 32_000 + 54_000));
    }

    #[test]
    fn a_missing_part_is_written_with_its_reason() {
        let missing = Measured::Missing { unavailable: "no /dev/kvm".to_owned() };
        let json = serde_json::to_string(&missing).unwrap();
        assert_eq!(json, r#"{"unavailable":"no /dev/kvm"}"#);
        assert_eq!(serde_json::from_str::<Measured>(&json).unwrap(), missing);
        let report = synthetic();
        let read: FloorReport = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        assert_eq!(read, report);
    }
}
