//! Which elements of an array go to which rows of a slot.

use std::borrow::Cow;

use super::Sink;

/// Elements and their places.
#[derive(Debug, Clone)]
pub(crate) enum Rows<'a> {
    /// The whole array, to neighbouring rows from `first` on.
    Run { first: u64, count: usize },
    /// Pairs of (element, row), best ascending by row: neighbours become one write.
    Scattered(Cow<'a, [(u32, u64)]>),
}

impl Rows<'_> {
    /// Puts items of `width` bytes: item `i` of `items` belongs to element `i`.
    pub(super) fn put(&self, sink: &mut impl Sink, base: u64, width: usize, items: &[u8]) {
        let place = |row: u64| base + row * width as u64;
        match self {
            Rows::Run { first, count } => sink.push(place(*first), &items[..count * width]),
            Rows::Scattered(pairs) => {
                for (element, row) in pairs.iter() {
                    let start = *element as usize * width;
                    sink.push(place(*row), &items[start..start + width]);
                }
            }
        }
    }

    /// Puts the same item for every row.
    pub fn put_same(&self, sink: &mut impl Sink, base: u64, item: &[u8]) {
        match self {
            Rows::Run { first, count } => {
                let at = base + first * item.len() as u64;
                sink.push(at, &item.repeat(*count));
            }
            Rows::Scattered(pairs) => {
                for (_, row) in pairs.iter() {
                    sink.push(base + row * item.len() as u64, item);
                }
            }
        }
    }

    /// Puts items that were made for these rows, in their order: item `i` belongs to the `i`-th
    /// row here.
    pub(super) fn put_made(&self, sink: &mut impl Sink, base: u64, width: usize, items: &[u8]) {
        let place = |row: u64| base + row * width as u64;
        match self {
            Rows::Run { first, .. } => sink.push(place(*first), items),
            Rows::Scattered(pairs) => {
                for ((_, row), item) in pairs.iter().zip(items.chunks_exact(width)) {
                    sink.push(place(*row), item);
                }
            }
        }
    }

    /// The elements, in the order of their rows.
    pub(super) fn elements(&self) -> Box<dyn Iterator<Item = usize> + '_> {
        match self {
            Rows::Run { count, .. } => Box::new(0..*count),
            Rows::Scattered(pairs) => Box::new(pairs.iter().map(|(element, _)| *element as usize)),
        }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        match self {
            Rows::Run { count, .. } => *count,
            Rows::Scattered(pairs) => pairs.len(),
        }
    }

    /// The same where each element stands for `size` elements of a child.
    pub fn times(&self, size: u32) -> Rows<'static> {
        match self {
            Rows::Run { first, count } => Rows::Run {
                first: first * u64::from(size),
                count: count * size as usize,
            },
            Rows::Scattered(pairs) => {
                let each = |(element, row): &(u32, u64)| {
                    let (element, row) = (element * size, row * u64::from(size));
                    (0..size).map(move |i| (element + i, row + u64::from(i)))
                };
                Rows::Scattered(pairs.iter().flat_map(each).collect())
            }
        }
    }
}
