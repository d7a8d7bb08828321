//! Which segments to merge. Pure: sizes in, a range out.

use std::ops::Range;

/// What the plan needs to know about one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentSize {
    pub bytes: u64,
    pub rows: u64,
    pub superseded_rows: u64,
}

/// When to merge.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MergeLimits {
    /// At most this many segments at rest.
    pub max_segments: usize,
    /// Segments of like size are merged once there are this many.
    pub min_run: usize,
    /// A segment is rewritten once this share of its rows, in percent, is superseded.
    pub superseded_percent: u64,
}

/// The segments to merge next, as a range over `segments` (oldest commit first), which must
/// stay adjacent so that newer segments keep deciding. `None` when all is well.
pub(crate) fn plan_merge(segments: &[SegmentSize], limits: &MergeLimits) -> Option<Range<usize>> {
    let count = segments.len();
    // A run that ends at the newest, whose oldest is no larger than the rest together:
    // every byte is rewritten once per doubling.
    for start in 0..count.saturating_sub(limits.min_run - 1) {
        let newer: u64 = segments[start + 1..].iter().map(|s| s.bytes).sum();
        if segments[start].bytes <= newer {
            return Some(start..count);
        }
    }
    let worn = |s: &SegmentSize| {
        u128::from(s.superseded_rows) * 100
            > u128::from(s.rows) * u128::from(limits.superseded_percent)
    };
    if let Some(at) = segments.iter().position(worn) {
        return Some(at..at + 1);
    }
    if count > limits.max_segments {
        // The cheapest adjacent segments that bring the count back.
        let length = count - limits.max_segments + 1;
        return (0..=count - length)
            .min_by_key(|&at| {
                segments[at..at + length]
                    .iter()
                    .map(|s| s.bytes)
                    .sum::<u64>()
            })
            .map(|at| at..at + length);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: MergeLimits = MergeLimits {
        max_segments: 12,
        min_run: 4,
        superseded_percent: 30,
    };

    fn sized(bytes: &[u64]) -> Vec<SegmentSize> {
        bytes
            .iter()
            .map(|&bytes| SegmentSize {
                bytes,
                rows: bytes,
                superseded_rows: 0,
            })
            .collect()
    }

    #[test]
    fn like_sizes_merge_and_a_large_one_is_left_alone() {
        assert_eq!(plan_merge(&sized(&[1, 1, 1]), &LIMITS), None);
        assert_eq!(plan_merge(&sized(&[1, 1, 1, 1]), &LIMITS), Some(0..4));
        assert_eq!(plan_merge(&sized(&[1000, 1, 1, 1]), &LIMITS), None);
        assert_eq!(plan_merge(&sized(&[1000, 1, 1, 1, 1]), &LIMITS), Some(1..5));
    }

    #[test]
    fn a_worn_segment_is_rewritten() {
        let mut segments = sized(&[1000, 1]);
        segments[0].superseded_rows = 301;
        assert_eq!(plan_merge(&segments, &LIMITS), Some(0..1));
        segments[0].superseded_rows = 300;
        assert_eq!(plan_merge(&segments, &LIMITS), None);
    }

    #[test]
    fn any_growth_stays_within_a_dozen_segments_and_a_logarithmic_cost() {
        let mut segments: Vec<u64> = Vec::new();
        let (mut written, mut flushed, mut most) = (0u64, 0u64, 0);
        for step in 0..4000u64 {
            let bytes = 50 + step % 30;
            segments.push(bytes);
            flushed += bytes;
            while let Some(range) = plan_merge(&sized(&segments), &LIMITS) {
                let merged: u64 = segments[range.clone()].iter().sum();
                written += merged;
                segments.splice(range, [merged]);
            }
            most = most.max(segments.len());
        }
        assert!(most <= 12, "{most} segments");
        assert!(
            written < flushed * 13,
            "write amplification {}",
            written / flushed
        );
    }

    #[test]
    fn many_shrinking_segments_are_brought_back_to_the_bound() {
        let sizes: Vec<u64> = (0..16).map(|i| 1u64 << (60 - 3 * i)).collect();
        let range = plan_merge(&sized(&sizes), &LIMITS).unwrap();
        assert_eq!(range.len(), 5);
        assert_eq!(range.end, 16);
    }
}
