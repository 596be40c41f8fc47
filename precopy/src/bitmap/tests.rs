use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// The size of a RAM, and two sets of its pages, as trees: single pages and stretches.
fn two_sets() -> impl Strategy<Value = (u64, BTreeSet<u64>, BTreeSet<u64>)> {
    (1_u64..400).prop_flat_map(|pages| {
        let stretch = (0..pages, prop_oneof![Just(1), 1_u64..200]);
        let set = prop::collection::vec(stretch, 0..12).prop_map(move |stretches| {
            stretches.iter().flat_map(|(first, count)| *first..(first + count).min(pages)).collect()
        });
        (Just(pages), set.clone(), set)
    })
}

fn bitmap(pages: u64, tree: &BTreeSet<u64>) -> PageBitmap {
    let mut bitmap = PageBitmap::new(PageCount(pages));
    tree.iter().for_each(|page| assert!(bitmap.insert(PageIndex(*page))));
    bitmap
}

fn tree(bitmap: &PageBitmap) -> BTreeSet<u64> {
    bitmap.iter().map(|page| page.0).collect()
}

proptest! {
    #[test]
    fn sets_are_combined_as_trees_would_be((pages, a, b) in two_sets()) {
        let (one, two) = (bitmap(pages, &a), bitmap(pages, &b));
        prop_assert_eq!(one.intersect_count(&two).0, a.intersection(&b).count() as u64);
        prop_assert_eq!(one.is_empty(), a.is_empty());
        let combined = |operation: fn(&mut PageBitmap, &PageBitmap)| {
            let mut all = one.clone();
            operation(&mut all, &two);
            tree(&all)
        };
        prop_assert_eq!(combined(PageBitmap::unite), &a | &b);
        prop_assert_eq!(combined(PageBitmap::subtract), &a - &b);
        prop_assert_eq!(combined(PageBitmap::intersect), &a & &b);
        prop_assert!(combined(|set, _| set.clear()).is_empty());
    }

    #[test]
    fn runs_are_as_long_as_they_can_be((pages, set, _) in two_sets()) {
        let runs: Vec<_> = bitmap(pages, &set).runs().map(|(first, count)| first.0..first.0 + count.0).collect();
        prop_assert!(runs.iter().all(|run| !run.is_empty()));
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        prop_assert!(runs.into_iter().flatten().eq(set));
    }

    #[test]
    fn words_are_the_set_again((pages, set, _) in two_sets()) {
        let mut all = bitmap(pages, &set);
        prop_assert_eq!(&PageBitmap::from_words(all.words(), PageCount(pages)), &all);
        let mut parts = PageBitmap::new(PageCount(pages));
        for (index, word) in all.nonzero_words() {
            prop_assert!(word != 0 && word == all.word(index));
            parts.insert_word(index, word);
        }
        prop_assert_eq!(&parts, &all);
        let mut taken = Vec::new();
        for index in 0..all.words().len() {
            taken.push(all.take_word(index));
        }
        prop_assert!(all.is_empty());
        prop_assert_eq!(taken, parts.words());
    }

    #[test]
    fn it_is_the_set_that_a_tree_would_be(pages in 1_u64..300, steps in prop::collection::vec((any::<bool>(), 0_u64..320), 0..400)) {
        let (mut bitmap, mut tree) = (PageBitmap::new(PageCount(pages)), BTreeSet::new());
        for (add, page) in steps {
            if add {
                prop_assert_eq!(bitmap.insert(PageIndex(page)), page < pages && tree.insert(page));
            } else {
                prop_assert_eq!(bitmap.remove(PageIndex(page)), tree.remove(&page));
            }
        }
        prop_assert_eq!(bitmap.count().0, tree.len() as u64);
        prop_assert!(bitmap.iter().map(|page| page.0).eq(tree.iter().copied()));
    }

    #[test]
    fn words_from_outside_never_name_pages_past_the_end(pages in 1_u64..300, words in prop::collection::vec(any::<u64>(), 0..8)) {
        let bitmap = PageBitmap::from_words(&words, PageCount(pages));
        prop_assert!(bitmap.iter().all(|page| page.0 < pages));
        let named = |page: u64| words.get(usize::try_from(page / 64).unwrap()).is_some_and(|word| word >> (page % 64) & 1 == 1);
        prop_assert!((0..pages).all(|page| bitmap.contains(PageIndex(page)) == named(page)));
    }
}

#[test]
fn all_pages_are_exactly_all_pages() {
    for pages in [1, 63, 64, 65, 128] {
        assert_eq!(PageBitmap::full(PageCount(pages)).count(), PageCount(pages));
    }
}

#[test]
fn words_past_the_end_are_neither_there_nor_taken() {
    let mut set = PageBitmap::new(PageCount(70));
    set.insert_word(1, u64::MAX);
    set.insert_word(2, u64::MAX);
    assert_eq!((set.count(), set.word(1), set.word(2)), (PageCount(6), 0b11_1111, 0));
    assert_eq!((set.take_word(2), set.take_word(1), set.take_word(1)), (0, 0b11_1111, 0));
}

#[test]
fn a_union_holds_both() {
    let (mut one, mut two) = (PageBitmap::new(PageCount(100)), PageBitmap::new(PageCount(100)));
    one.insert(PageIndex(3));
    two.insert(PageIndex(99));
    one.unite(&two);
    assert!(one.iter().eq([PageIndex(3), PageIndex(99)]));
}
