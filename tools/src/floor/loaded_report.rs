//! What `switchover floor` found beside a stream and a busy vCPU.

use serde::{Deserialize, Serialize};

use super::percentiles::Percentiles;
use super::report::{FloorSum, Measured};

/// What this machine can do at best while memory is streamed and a vCPU works.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LoadedReport {
    /// Who faults and who is busy: `guest`, or `user` where there is no KVM and a thread stands in.
    pub vcpu: String,
    /// How long it works between two faults.
    pub work_ns: u64,
    /// What the stream was held to, in bit/s; absent where by nothing.
    pub stream_limit_bit_s: Option<u64>,
    /// A fault that is answered at once, of a vCPU that works in between.
    pub fault: LoadedWays,
    /// 16 bytes one way and 4 KiB back over TCP, beside a vCPU that is always busy.
    pub tcp: LoadedWays,
    /// A fault whose page is asked for over TCP before it is answered, of a vCPU that works in between.
    pub remote: LoadedWays,
    /// The loaded F: a fault and a request/response, percentile by percentile.
    pub sums: Vec<FloorSum>,
    /// What streams carry when nothing bounds them and nobody faults.
    pub streams: Vec<StreamRate>,
}

/// One part measured with both ways of waiting.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LoadedWays {
    /// Whoever waits for the other side sleeps in the kernel.
    pub sleeping: Loaded,
    /// Whoever waits asks again and again.
    pub spinning: Loaded,
}

/// One part, and what the stream carried meanwhile.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Loaded {
    /// The round trips' percentiles.
    #[serde(flatten)]
    pub round: Measured,
    /// What the stream beside it carried, in bit/s.
    pub stream_bit_s: Option<u64>,
}

/// What a plain stream carries.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StreamRate {
    /// TCP connections, each with a thread at both ends.
    pub connections: u32,
    /// What was busy beside it: `nothing`, `guest`, or `user`.
    pub beside: String,
    /// Bits a second, of all connections together.
    pub bit_s: u64,
}

impl LoadedReport {
    /// Puts fault, request and remote fault together and sums the first two up.
    #[must_use]
    pub fn new(
        vcpu: &str,
        work_ns: u64,
        stream_limit_bit_s: Option<u64>,
        [fault, tcp, remote]: [LoadedWays; 3],
        streams: Vec<StreamRate>,
    ) -> Self {
        let ways = [("sleeping", &fault.sleeping, &tcp.sleeping), ("spinning", &fault.spinning, &tcp.spinning)];
        let sums = ways.into_iter().filter_map(|(way, fault, request)| {
            Some(FloorSum::of("tcp", way, vcpu, fault.round.round()?, request.round.round()?))
        });
        let sums = sums.collect();
        Self { vcpu: vcpu.to_owned(), work_ns, stream_limit_bit_s, fault, tcp, remote, sums, streams }
    }

    /// Every part by name and way of waiting, in the order in which they are shown.
    #[must_use]
    pub fn parts(&self) -> [(String, &'static str, &Loaded); 6] {
        let fault = match self.vcpu.as_str() {
            "guest" => "fault of a KVM guest",
            _ => "fault of a user thread",
        };
        let whole = format!("{fault} + 4 KiB, in one");
        [
            (fault.to_owned(), "sleeping", &self.fault.sleeping),
            (fault.to_owned(), "spinning", &self.fault.spinning),
            ("4 KiB over TCP loopback".to_owned(), "sleeping", &self.tcp.sleeping),
            ("4 KiB over TCP loopback".to_owned(), "spinning", &self.tcp.spinning),
            (whole.clone(), "sleeping", &self.remote.sleeping),
            (whole, "spinning", &self.remote.spinning),
        ]
    }

    /// The whole remote fault's percentiles, where there are any.
    #[must_use]
    pub fn remote(&self, way: &str) -> Option<&Percentiles> {
        let loaded = if way == "spinning" { &self.remote.spinning } else { &self.remote.sleeping };
        loaded.round.round()
    }
}

/// A made-up report for tests of what shows one.
#[cfg(test)]
pub fn synthetic() -> LoadedReport {
    let ways = |sleeping: u64, spinning: u64| {
        let [sleeping, spinning] = [sleeping, spinning].map(|p50_ns| Loaded {
            round: Measured::Round(super::report::synthetic_round(p50_ns)),
            stream_bit_s: Some(9_000_000_000),
        });
        LoadedWays { sleeping, spinning }
    };
    let parts = [ways(160_000, 900_000), ways(120_000, 8_000_000), ways(300_000, 9_000_000)];
    let rate = |beside: &str, bit_s| StreamRate { connections: 1, beside: beside.to_owned(), bit_s };
    let streams = vec![rate("nothing", 30_000_000_000), rate("guest", 21_000_000_000)];
    LoadedReport::new("guest", 100_000, None, parts, streams)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_f_is_the_sum_of_its_parts() {
        let report = synthetic();
        let sum = &report.sums[1];
        assert_eq!((sum.way.as_str(), sum.fault.as_str(), sum.p50_ns), ("spinning", "guest", 8_900_000));
        assert_eq!(sum.p99_9_ns, 4 * 8_900_000);
        assert_eq!(report.remote("spinning").unwrap().p50_ns, 9_000_000);
    }

    #[test]
    fn a_part_reads_back_with_its_stream_whether_or_not_it_was_measured() {
        let mut report = synthetic();
        report.fault.spinning =
            Loaded { round: Measured::Missing { unavailable: "no memory".to_owned() }, stream_bit_s: None };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["tcp"]["sleeping"]["p50_ns"], 120_000);
        assert_eq!(json["tcp"]["sleeping"]["stream_bit_s"], 9_000_000_000_u64);
        assert_eq!(serde_json::from_value::<LoadedReport>(json).unwrap(), report);
    }
}
