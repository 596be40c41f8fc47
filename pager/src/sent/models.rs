//! Lanes and the fault server claim pages of one chunk at once.

use loom::sync::Arc;
use loom::thread;

use super::*;
use crate::sync::explore;

const CHUNK: ChunkIndex = ChunkIndex(0);

#[test]
fn each_page_is_sent_by_one() {
    explore(3, || {
        let sent = Arc::new(SentPages::new(PageCount(8)));
        let lane = |wanted| {
            let sent = Arc::clone(&sent);
            thread::spawn(move || sent.claim(CHUNK, wanted))
        };
        let lanes = [lane(0b0011_1111), lane(0b1111_1100)];
        let answered = {
            let sent = Arc::clone(&sent);
            thread::spawn(move || sent.mark(PageIndex(3)))
        };
        let own = sent.claim(CHUNK, 0b0000_0011);
        let done = sent.is_done(CHUNK);
        let [one, two] = lanes.map(|lane| lane.join().unwrap());
        answered.join().unwrap();
        assert_eq!((one & two, own & (one | two)), (0, 0), "a page was claimed twice");
        assert_eq!(own | one | two | 0b1000, 0xff, "a page was claimed by nobody");
        assert!(sent.is_done(CHUNK) && sent.remaining() == PageCount(0));
        assert!(!done || (own | one | two | 0b1000) == 0xff, "done before all was claimed");
    });
}
