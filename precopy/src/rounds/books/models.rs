//! Lanes take and send one page's versions while receipts come.

use loom::thread;
use switchover_wire::socket::Socket;
use switchover_wire::types::LaneRole;

use super::*;
use crate::pack::PackSettings;

const CHUNK: ChunkIndex = ChunkIndex(0);
const PAGE: u64 = 1;

fn explore(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(body);
}

/// The books of two lanes. Their sockets are never used; making them anew for each interleaving would take long.
fn books(lanes: &[PageLane]) -> Arc<Books> {
    Arc::new(Books::new(PageCount(8), lanes, SentVersions::new(PackSettings::default())))
}

fn lanes() -> Vec<PageLane> {
    let lane = |index| PageLane {
        id: LaneId { role: LaneRole::Bulk, index },
        socket: Arc::new(Socket::pair().unwrap().0),
        checksums: true,
    };
    (0..2).map(lane).collect()
}

/// Takes the page if it may, and sends it. Says whether.
fn send(books: &Books, lane: usize) -> bool {
    let taken = books.take(CHUNK, PAGE) == PAGE;
    if taken {
        let frame = Frame { chunk: CHUNK, data: PAGE, zero: 0, chunks: 1, bytes: 1, pinned: Vec::new() };
        books.send(lane, frame);
    }
    taken
}

fn frames(books: &Books) -> usize {
    books.in_streams().iter().map(|stream| stream.chunks.len()).sum()
}

#[test]
fn two_versions_are_never_under_way() {
    let lanes = lanes();
    explore(move || {
        let books = books(&lanes);
        assert!(send(&books, 0));
        let other = {
            let books = Arc::clone(&books);
            thread::spawn(move || send(&books, 1))
        };
        let receipts = {
            let books = Arc::clone(&books);
            thread::spawn(move || books.taken(0, 1))
        };
        let own = send(&books, 1);
        assert!(frames(&books) <= 2);
        let theirs = other.join().unwrap();
        receipts.join().unwrap().unwrap();
        assert!(!(own && theirs), "two lanes send one page");
        // The first frame was acknowledged: what is under way is what was sent since.
        assert_eq!(frames(&books), usize::from(own || theirs));
        assert_eq!(books.under_way().count(), PageCount(u64::from(own || theirs)));
    });
}

/// The handoff reads the set first, then the streams: what the set lacks is in no stream, or was acknowledged.
#[test]
fn what_the_set_lacks_is_in_no_stream() {
    let lanes = lanes();
    explore(move || {
        let books = books(&lanes);
        assert!(send(&books, 0));
        let receipts = {
            let books = Arc::clone(&books);
            thread::spawn(move || books.taken(0, 1))
        };
        let set = books.under_way().count();
        let streams = frames(&books);
        assert!(set.0 == 1 || streams == 0, "a stream holds a page that the set lacks");
        receipts.join().unwrap().unwrap();
        assert!(books.all_taken() && books.under_way().is_empty() && books.taken_bytes() == 1);
    });
}

#[test]
fn receipts_that_come_twice_or_too_early_free_nothing_twice() {
    let lanes = lanes();
    explore(move || {
        let books = books(&lanes);
        assert!(send(&books, 0));
        let other = {
            let books = Arc::clone(&books);
            thread::spawn(move || books.taken(0, 1))
        };
        let mine = books.taken(0, 1);
        assert!(mine.is_ok() && other.join().unwrap().is_ok());
        assert_eq!((books.taken_bytes(), books.taken(0, 0), books.taken(0, 2)), (1, Err(NeverSent), Err(NeverSent)));
    });
}
