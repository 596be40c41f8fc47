//! A source that is played by hand, against a real destination's pager.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use switchover_pager::destination::DestinationPager;
use switchover_pager::lane::{PageLane, PagerEvent};
use switchover_pager::ram::Ram;
use switchover_pager::stripes::Stripes;
use switchover_wire::checksum::Checksum;
use switchover_wire::frame::bulk::{BulkFrame, FrameFlags, Taken};
use switchover_wire::frame::fault::{FaultReply, FaultRequest, ReplyContent};
use switchover_wire::ring::Ring;
use switchover_wire::types::{LaneRole, PAGE_SIZE, PageCount, PageIndex};

use crate::common::{events, lane_pair};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// Flags of a frame of pre-copy.
pub fn precopy(acknowledge: bool) -> FrameFlags {
    FrameFlags { precopy: true, acknowledge }
}

pub fn chunk(first: u64, data: u64, zero: u64) -> BulkFrame {
    BulkFrame::Chunk { first: PageIndex(first), data, zero }
}

pub fn zeros(first: u64, count: u64) -> BulkFrame {
    BulkFrame::Zeros { first: PageIndex(first), count: PageCount(count) }
}

/// A page full of one word.
pub fn filled(word: u64) -> Vec<u8> {
    word.to_le_bytes().repeat(PAGE_SIZE / 8)
}

/// Reads a word of the alias, which nobody watches.
pub fn alias_read(ram: &Ram, page: u64, word: usize) -> u64 {
    let start = ram.alias_of(PageIndex(page)).unwrap().cast::<u64>();
    assert!(word < PAGE_SIZE / 8);
    // SAFETY: inside the alias; volatile, because the pager may be writing it.
    unsafe { start.wrapping_add(word).read_volatile() }
}

/// Whether the guest would read `page` without a fault.
pub fn is_mapped(ram: &Ram, page: u64) -> bool {
    let address = ram.guest_base() as u64 + page * PAGE_SIZE as u64;
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    pagemap.read_exact_at(&mut entry, address / PAGE_SIZE as u64 * 8).unwrap();
    // Bit 63 of an entry: present (the kernel's Documentation/admin-guide/mm/pagemap.rst).
    u64::from_le_bytes(entry) >> 63 == 1
}

pub fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < end, "never came: {what}");
        thread::yield_now();
    }
}

/// The source's ends of all lanes, and the pager at the others.
pub struct Hand {
    pub ram: Ram,
    pub events: Receiver<PagerEvent>,
    pager: Option<DestinationPager>,
    lanes: Vec<PageLane>,
    beyond: Vec<PageLane>,
    ring: Ring,
    fault: Vec<PageLane>,
    requests: Receiver<(usize, FaultRequest)>,
    receipts: Vec<Receiver<Taken>>,
}

/// Both ends of the lanes of a link, and what comes to the source's.
struct Ends {
    near: Vec<PageLane>,
    beyond: Vec<PageLane>,
    fault: Vec<PageLane>,
    far_fault: Vec<PageLane>,
    requests: Receiver<(usize, FaultRequest)>,
    receipts: Vec<Receiver<Taken>>,
}

impl Ends {
    fn new(pages: u64, fault_lanes: u8, lanes: u8) -> Self {
        let fault_lanes = (0..fault_lanes).map(|index| lane_pair(LaneRole::Fault, index));
        let (fault, far_fault): (Vec<_>, Vec<_>) = fault_lanes.unzip();
        let (near, beyond): (Vec<_>, Vec<_>) = (0..lanes).map(|index| lane_pair(LaneRole::Bulk, index)).unzip();
        let (sender, requests) = unbounded();
        for (number, lane) in fault.iter().enumerate() {
            listen(lane, &sender, move |bytes: &[u8; FaultRequest::LEN]| {
                (number, FaultRequest::decode(bytes, PageCount(pages)).unwrap())
            });
        }
        let receipt = |lane| {
            let (sender, receipts) = unbounded();
            listen(lane, &sender, |bytes| Taken::decode(bytes).unwrap());
            receipts
        };
        let receipts = near.iter().map(receipt).collect();
        Self { near, beyond, fault, far_fault, requests, receipts }
    }

    fn far(&self) -> Vec<PageLane> {
        // In no order: a lane is known by its number.
        self.far_fault.iter().rev().chain(&self.beyond).cloned().collect()
    }
}

impl Hand {
    /// A destination of this size that waits for pre-copy over `lanes` bulk lanes.
    pub fn new(pages: u64, lanes: u8, lazy: bool) -> Self {
        Self::sharded(pages, 1, lanes, lazy)
    }

    /// The same, with several fault lanes.
    pub fn sharded(pages: u64, fault_lanes: u8, lanes: u8, lazy: bool) -> Self {
        let ram = Ram::new(PageCount(pages)).unwrap();
        let (notify, events) = events();
        let ends = Ends::new(pages, fault_lanes, lanes);
        let pager = DestinationPager::start(ram.clone(), ends.far(), lazy, &notify).unwrap();
        let Ends { near, beyond, fault, requests, receipts, .. } = ends;
        let ring = Ring::new(2).unwrap();
        Self { ram, events, pager: Some(pager), lanes: near, beyond, ring, fault, requests, receipts }
    }

    /// The link is lost, and what it reported is looked at no more.
    pub fn detach(&mut self) {
        self.lanes.iter().chain(&self.fault).for_each(|lane| lane.socket.shutdown());
        self.pager.as_mut().unwrap().detach();
        let lost = self.events.try_iter().filter(|event| !matches!(event, PagerEvent::LaneFailed { .. }));
        assert_eq!(lost.collect::<Vec<_>>(), []);
    }

    /// New lanes in place of lost ones.
    pub fn attach(&mut self, lanes: u8) {
        let ends = Ends::new(self.ram.pages().0, u8::try_from(self.fault.len()).unwrap(), lanes);
        self.pager.as_mut().unwrap().attach(ends.far()).unwrap();
        let Ends { near, beyond, fault, requests, receipts, .. } = ends;
        (self.lanes, self.beyond, self.fault, self.requests, self.receipts) = (near, beyond, fault, requests, receipts);
    }

    /// New lanes in place of lost ones, of which so many are fault lanes. Why they are not taken.
    pub fn refused(&mut self, fault_lanes: u8) -> String {
        let ends = Ends::new(self.ram.pages().0, fault_lanes, 1);
        self.pager.as_mut().unwrap().attach(ends.far()).unwrap_err().to_string()
    }

    /// Bytes on the first fault lane, of part of an answer perhaps.
    pub fn send_fault_bytes(&mut self, bytes: &[u8]) {
        self.ring.send_all(self.fault[0].socket.as_fd(), &[IoSlice::new(bytes)]).unwrap();
    }

    /// Bytes on the fault lane of `page`.
    pub fn send_fault_bytes_for(&mut self, page: PageIndex, bytes: &[u8]) {
        let socket = &self.fault[self.lane_of(page)].socket;
        self.ring.send_all(socket.as_fd(), &[IoSlice::new(bytes)]).unwrap();
    }

    /// The fault lane that `page` is asked for on.
    pub fn lane_of(&self, page: PageIndex) -> usize {
        Stripes::new(self.ram.pages(), u8::try_from(self.fault.len()).unwrap()).shard_of(page)
    }

    pub fn pager(&self) -> &DestinationPager {
        self.pager.as_ref().unwrap()
    }

    /// A whole frame.
    pub fn send(&mut self, lane: usize, frame: &BulkFrame, flags: FrameFlags, payload: &[&[u8]]) {
        let bytes: usize = payload.iter().map(|part| part.len()).sum();
        assert_eq!(bytes, frame.payload(), "a mistake of the test");
        self.send_bytes(lane, &frame.encode(flags, Checksum::of(payload.iter().copied())));
        payload.iter().for_each(|part| self.send_bytes(lane, part));
    }

    /// Bytes, of part of a frame perhaps.
    pub fn send_bytes(&mut self, lane: usize, bytes: &[u8]) {
        self.ring.send_all(self.lanes[lane].socket.as_fd(), &[IoSlice::new(bytes)]).unwrap();
    }

    /// A frame of pre-copy that the destination must take.
    pub fn version(&mut self, lane: usize, frame: &BulkFrame, payload: &[&[u8]]) {
        self.send(lane, frame, precopy(true), payload);
        self.taken(lane);
    }

    /// The next receipt on a lane: how many frames it has taken since it began.
    pub fn taken(&self, lane: usize) -> u64 {
        let next = self.receipts[lane].recv_timeout(PATIENCE);
        next.unwrap_or_else(|_| panic!("no receipt on lane {lane}; {:?}", self.events.try_recv())).frames
    }

    /// Whether a receipt is here that nobody has looked at.
    pub fn receipt_is_here(&self, lane: usize) -> bool {
        !self.receipts[lane].is_empty()
    }

    /// Bytes that the destination has counted on a lane.
    pub fn received(&self, lane: usize) -> u64 {
        self.beyond[lane].socket.counters().received()
    }

    /// The next request for a page, on the lane of that page.
    pub fn request(&self) -> FaultRequest {
        let (lane, request) = self.requests.recv_timeout(PATIENCE).expect("nobody asks for the page");
        assert_eq!(lane, self.lane_of(request.page), "{} was asked for on another's lane", request.page);
        request
    }

    /// Whether a request is here that nobody has looked at.
    pub fn request_is_here(&self) -> bool {
        !self.requests.is_empty()
    }

    pub fn answer(&mut self, request: FaultRequest, content: ReplyContent, bytes: &[u8]) {
        let reply = FaultReply { page: request.page, tag: request.tag, content }.encode(Checksum::of([bytes]));
        self.send_fault_bytes_for(request.page, &[&reply, bytes].concat());
    }

    /// Why a bulk lane has ended.
    pub fn lane_failed(&self, lane: u8) -> String {
        match self.events.recv_timeout(PATIENCE) {
            Ok(PagerEvent::LaneFailed { lane: id, reason }) => {
                assert_eq!((id.role, id.index), (LaneRole::Bulk, lane), "{reason}");
                reason
            }
            other => panic!("lane {lane} was to end, but {other:?}"),
        }
    }

    /// The source's end of a lane goes away.
    pub fn cut(&self, lane: usize) {
        self.lanes[lane].socket.shutdown();
    }

    /// What is missing comes as zero on lane 0, memory is complete, and the pager ends without an error.
    pub fn finish_with_zeros(&mut self) {
        let pages = self.ram.pages().0;
        self.send(0, &zeros(0, pages), FrameFlags::default(), &[]);
        self.complete();
    }

    /// Memory is complete, and the pager ends without an error.
    pub fn complete(&mut self) {
        assert_eq!(self.events.recv_timeout(PATIENCE), Ok(PagerEvent::Complete));
        self.end_complete();
    }

    /// The pager, which has said that memory is complete, ends without an error.
    pub fn end_complete(&mut self) {
        self.pager.as_mut().unwrap().finish().unwrap();
        assert_eq!(self.events.try_iter().collect::<Vec<_>>(), []);
    }

    /// The end of a session in which nobody runs.
    pub fn end(&mut self) {
        if let Some(pager) = self.pager.take() {
            pager.abandon();
        }
    }
}

/// Sends on what comes on a lane, decoded.
fn listen<const LEN: usize, T: Send + 'static>(
    lane: &PageLane,
    sender: &Sender<T>,
    decode: impl Fn(&[u8; LEN]) -> T + Send + 'static,
) {
    let (lane, sender) = (lane.clone(), sender.clone());
    thread::spawn(move || {
        let mut ring = Ring::new(2).unwrap();
        let mut bytes = [0; LEN];
        while ring.recv_exact(lane.socket.as_fd(), &mut [IoSliceMut::new(&mut bytes)]).is_ok() {
            if sender.send(decode(&bytes)).is_err() {
                return;
            }
        }
    });
}
