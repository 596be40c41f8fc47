//! Guest memory as one number a page, and the guest that reads and writes it where it runs.

use super::network::{End, FAULT, Message};
use super::world::{ALL_PAGES, PAGES, World};
use crate::session::destination::DestinationEvent;

/// A machine, as far as a migration sees it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine {
    pub runs: bool,
    pub may_run: bool,
}

/// What the destination's pager knows. Sets of pages are a bit a page.
#[derive(Clone, Debug)]
pub struct Pager {
    pub memory: [u32; PAGES],
    pub missing: u32,
    pub handed_over: bool,
    pub watched: bool,
    /// Pages that a vCPU waits for.
    pub wanted: u32,
    /// The link whose pages count.
    pub attached: Option<usize>,
}

impl Default for Pager {
    fn default() -> Self {
        Self { memory: [0; PAGES], missing: ALL_PAGES, handed_over: false, watched: true, wanted: 0, attached: None }
    }
}

/// vCPUs: so many pages can be waited for at once.
const VCPUS: u32 = 2;

impl World {
    /// The guest reads a page, and often writes it, on each side where it runs.
    pub fn guest_works(&mut self) {
        let page = self.dice.index(PAGES);
        if self.source.alive && self.source.machine.runs {
            self.must(self.source.memory[page] == self.truth[page], "a wrong byte on the source");
            if self.dice.one_in(2) {
                self.must(!self.source.serving, "pages are served while the guest changes them");
                self.source.memory[page] = self.write(page);
                if self.source.noting {
                    self.source.noted |= 1 << page;
                }
            }
        }
        if self.destination.alive && self.destination.machine.runs {
            self.touch(page);
        }
    }

    fn write(&mut self, page: usize) -> u32 {
        self.last_written += 1;
        self.truth[page] = if self.dice.one_in(4) { 0 } else { self.last_written };
        self.truth[page]
    }

    fn touch(&mut self, page: usize) {
        let pager = &mut self.destination.pager;
        if pager.wanted.count_ones() >= VCPUS {
            return;
        }
        if pager.watched && pager.missing >> page & 1 == 1 {
            pager.wanted |= 1 << page;
            return self.ask(page);
        }
        self.must(self.destination.pager.memory[page] == self.truth[page], "a wrong byte on the destination");
        if self.dice.one_in(2) {
            self.destination.pager.memory[page] = self.write(page);
        }
    }

    fn ask(&mut self, page: usize) {
        if let Some(link) = self.destination.pager.attached {
            self.send(End::Destination, link, FAULT, Message::Request { page });
        }
    }

    /// The pager goes on over this link: what is waited for is asked for anew.
    pub fn attach(&mut self, link: usize) {
        self.destination.pager.attached = Some(link);
        let wanted = self.destination.pager.wanted;
        (0..PAGES).filter(|page| wanted >> page & 1 == 1).for_each(|page| self.ask(page));
        let lanes = self.links[link].lanes();
        self.read(End::Destination, link, FAULT..lanes);
    }

    /// A version of a page: it counts before the handoff.
    pub fn version_lands(&mut self, page: usize, bytes: u32) {
        let pager = &mut self.destination.pager;
        if !pager.handed_over {
            pager.memory[page] = bytes;
            pager.missing &= !(1 << page);
        }
    }

    /// A page: it counts where it is missing.
    pub fn page_lands(&mut self, page: usize, bytes: u32) {
        let pager = &mut self.destination.pager;
        if pager.missing >> page & 1 == 0 {
            return;
        }
        pager.memory[page] = bytes;
        pager.missing &= !(1 << page);
        pager.wanted &= !(1 << page);
        if pager.missing == 0 {
            self.complete();
        }
    }

    fn complete(&mut self) {
        self.destination.inbox.tell(DestinationEvent::Complete);
        self.wake(End::Destination);
    }

    /// The source has told which pages are still to come; what has come of them is forgotten.
    pub fn hand_over(&mut self, link: usize, set: u32) {
        let pager = &mut self.destination.pager;
        let known = pager.missing & !set == 0;
        (pager.missing, pager.handed_over) = (set, true);
        self.must(known, "the source forgets pages that never came");
        self.flush(link);
        if set == 0 {
            self.complete();
        }
    }
}
