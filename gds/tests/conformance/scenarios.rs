//! The scenarios. Each uses one backend through the trait alone and checks every byte; each
//! gives errors back, so that a run with failing driver calls can look at them.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use pinion_gds::{
    Backend, CopyPiece, DeviceKind, DmaFile, Edits, GdsError, LoadPath, LoadReport, Piece, Region,
    RegionMemory, RowBuffer,
};

/// How much a scenario does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Enough bytes for several blocks and threads.
    Full,
    /// The same calls over less: for being played once per call that fails.
    Small,
}

impl Scale {
    fn pick<T>(self, full: T, small: T) -> T {
        match self {
            Scale::Full => full,
            Scale::Small => small,
        }
    }
}

/// One story, under the name of what it shows.
pub struct Scenario {
    pub name: &'static str,
    body: fn(&dyn Backend, Scale) -> Result<(), GdsError>,
}

impl Scenario {
    /// Plays it; every error of the backend is a failure of the test.
    pub fn run(&self, backend: &dyn Backend) {
        self.play(backend, Scale::Full)
            .unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
    }

    /// Plays it and gives back the first error. Wrong bytes panic all the same.
    pub fn play(&self, backend: &dyn Backend, scale: Scale) -> Result<(), GdsError> {
        (self.body)(backend, scale)
    }
}

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        /// All of them.
        pub const SCENARIOS: &[Scenario] = &[$(Scenario {
            name: stringify!($name),
            body: $name,
        }),*];
    };
}

scenarios![
    new_regions_are_zero_and_large_enough,
    pieces_of_any_shape_arrive_and_leave_their_neighbours_alone,
    a_large_file_arrives_whole,
    a_file_may_be_loaded_in_any_order,
    a_piece_outside_the_region_is_refused_before_anything_is_read,
    a_file_that_ends_too_early_is_a_short_read,
    later_edits_win,
    edits_outside_are_refused_before_anything_is_written,
    the_same_edits_leave_the_same_bytes_in_two_regions,
    what_is_set_is_set_and_nothing_beside_it,
    copies_bring_stretches_over,
    copies_outside_are_refused_before_anything_is_copied,
    rows_come_to_the_same_places_and_nothing_else_does,
    rows_outside_are_refused_before_anything_is_copied,
    reading_outside_is_refused,
    nothing_to_do_is_done,
    regions_of_others_are_refused,
    an_exported_descriptor_is_its_own,
    memory_comes_back_when_the_last_clone_goes,
    too_much_memory_is_refused,
    regions_are_filled_side_by_side,
    load_write_copy_and_read_follow_each_other_without_a_pause,
];

/// Bytes that differ from page to page and within pages.
fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

struct TestFile {
    bytes: Vec<u8>,
    file: DmaFile,
}

impl TestFile {
    /// The file of this length, the same for all who ask.
    fn new(bytes: usize) -> Arc<TestFile> {
        static FILES: Mutex<BTreeMap<usize, Arc<TestFile>>> = Mutex::new(BTreeMap::new());
        let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        files
            .entry(bytes)
            .or_insert_with(|| Arc::new(TestFile::create(bytes)))
            .clone()
    }

    /// A synced file on the file system of the build, where `O_DIRECT` works.
    fn create(bytes: usize) -> TestFile {
        let beside = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let directory = tempfile::tempdir_in(beside).unwrap();
        let path = directory.path().join("columns");
        let bytes = pattern(bytes);
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
        TestFile {
            bytes,
            // Its name is not needed any more.
            file: DmaFile::open(&path).unwrap(),
        }
    }

    /// The next read finds nothing of it in memory.
    fn chill(&self) {
        let advice = rustix::fs::Advice::DontNeed;
        rustix::fs::fadvise(self.file.buffered(), 0, None, advice).unwrap();
    }
}

fn piece(file_offset: u64, region_offset: u64, bytes: u64) -> Piece {
    Piece {
        file_offset,
        region_offset,
        bytes,
    }
}

fn contents(backend: &dyn Backend, region: &Region) -> Result<Vec<u8>, GdsError> {
    let mut out = vec![0xee; region.bytes() as usize];
    backend.read(region, 0, &mut out)?;
    Ok(out)
}

#[track_caller]
fn assert_same(found: &[u8], wanted: &[u8]) {
    assert_eq!(found.len(), wanted.len());
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte that differs");
}

/// A load went the backend's way, or says why not.
#[track_caller]
fn assert_honest(backend: &dyn Backend, report: &LoadReport) {
    let slower = report.path == LoadPath::Bounce && backend.path() == LoadPath::Direct;
    assert!(report.path == backend.path() || slower, "{report:?}");
    let may_be_silent = report.path == LoadPath::Direct;
    assert!(report.reason.is_some() || may_be_silent, "{report:?}");
}

/// Errors of the driver pass through; success and any other error are failures.
#[track_caller]
fn refused<T: Debug>(
    result: Result<T, GdsError>,
    expected: fn(&GdsError) -> bool,
) -> Result<(), GdsError> {
    match result {
        Err(error) if expected(&error) => Ok(()),
        Err(error) => Err(error),
        Ok(done) => panic!("not refused: {done:?}"),
    }
}

fn out_of_range(error: &GdsError) -> bool {
    matches!(error, GdsError::OutOfRange { .. })
}

fn new_regions_are_zero_and_large_enough(
    backend: &dyn Backend,
    scale: Scale,
) -> Result<(), GdsError> {
    let large = scale.pick((2 << 20) + 1, 4097);
    for bytes in [0, 1, 4096, 5000, large] {
        let region = backend.allocate(bytes)?;
        assert!(region.bytes() >= bytes.max(1));
        assert!(contents(backend, &region)?.iter().all(|byte| *byte == 0));
        // The next one may get the same memory.
        let mut edits = Edits::default();
        edits.push(0, &[7; 1]);
        edits.push(region.bytes() - 1, &[7; 1]);
        backend.write(&region, &edits)?;
    }
    Ok(())
}

fn pieces_of_any_shape_arrive_and_leave_their_neighbours_alone(
    backend: &dyn Backend,
    _: Scale,
) -> Result<(), GdsError> {
    let file = TestFile::new(300_001);
    let shapes = [
        (0, 0, 300_001),
        (4096, 8192, 8192),
        (4096, 4096, 295_905),
        (4096, 100, 50_000),
        (1, 0, 4096),
        (4095, 4095, 4098),
        (299_999, 7, 2),
        (200_000, 3_904, 100_001),
        (123, 456, 789),
    ];
    for (file_offset, region_offset, bytes) in shapes {
        file.chill();
        let region = backend.allocate(400_000)?;
        let mut expected = vec![0; region.bytes() as usize];
        expected[region_offset..region_offset + bytes]
            .copy_from_slice(&file.bytes[file_offset..file_offset + bytes]);
        let asked = piece(file_offset as u64, region_offset as u64, bytes as u64);
        let report = backend.load(&file.file, &[asked], &region)?;
        assert_eq!(report.bytes, bytes as u64);
        assert_honest(backend, &report);
        assert_same(&contents(backend, &region)?, &expected);
    }
    Ok(())
}

fn a_large_file_arrives_whole(backend: &dyn Backend, scale: Scale) -> Result<(), GdsError> {
    let file = TestFile::new(scale.pick(37 << 20, 1 << 20) + 17);
    let bytes = file.bytes.len() as u64;
    for cold in [true, false] {
        if cold {
            file.chill();
        }
        let region = backend.allocate(bytes)?;
        backend.load(&file.file, &[piece(0, 0, bytes)], &region)?;
        assert_same(&contents(backend, &region)?[..bytes as usize], &file.bytes);
    }
    Ok(())
}

fn a_file_may_be_loaded_in_any_order(backend: &dyn Backend, scale: Scale) -> Result<(), GdsError> {
    let pages = scale.pick(400, 40); // 171 has no common factor with either
    let file = TestFile::new(pages * 4096);
    file.chill();
    let region = backend.allocate((pages * 4096) as u64)?;
    let page = |n: usize| (n * 4096) as u64;
    let pieces: Vec<Piece> = (0..pages)
        .map(|n| (n * 171) % pages)
        .map(|n| piece(page(n), page(pages - 1 - n), 4096))
        .collect();
    let report = backend.load(&file.file, &pieces, &region)?;
    assert_eq!(report.bytes, page(pages));
    let expected: Vec<u8> = file.bytes.rchunks(4096).flatten().copied().collect();
    assert_same(&contents(backend, &region)?[..expected.len()], &expected);
    Ok(())
}

fn a_piece_outside_the_region_is_refused_before_anything_is_read(
    backend: &dyn Backend,
    _: Scale,
) -> Result<(), GdsError> {
    let file = TestFile::new(20_000);
    let region = backend.allocate(10_000)?;
    let end = region.bytes();
    for wrong in [
        piece(0, end - 1, 2),
        piece(0, end + 1, 0),
        piece(0, u64::MAX, 1),
        piece(0, 1, u64::MAX),
    ] {
        let pieces = [piece(0, 0, 4096), wrong];
        refused(backend.load(&file.file, &pieces, &region), out_of_range)?;
    }
    assert!(contents(backend, &region)?.iter().all(|byte| *byte == 0));
    Ok(())
}

fn a_file_that_ends_too_early_is_a_short_read(
    backend: &dyn Backend,
    _: Scale,
) -> Result<(), GdsError> {
    let file = TestFile::new(10_000);
    let region = backend.allocate(100_000)?;
    for (offset, bytes) in [
        (0, 10_001),
        (0, 12_288),
        (8192, 8192),
        (10_000, 1),
        (50_000, 4096),
    ] {
        for cold in [true, false] {
            if cold {
                file.chill();
            }
            let loaded = backend.load(&file.file, &[piece(offset, 0, bytes)], &region);
            refused(loaded, |error| matches!(error, GdsError::ShortRead { .. }))?;
        }
    }
    let beyond = backend.load(&file.file, &[piece(u64::MAX - 4095, 0, 4096)], &region);
    refused(beyond, |error| {
        matches!(error, GdsError::ShortRead { .. } | GdsError::Io { .. })
    })?;
    // The region is still good for a load that fits.
    backend.load(&file.file, &[piece(0, 0, 10_000)], &region)?;
    assert_same(&contents(backend, &region)?[..10_000], &file.bytes);
    Ok(())
}

/// Many scattered writes and what they leave in `expected`.
fn scattered_edits(expected: &mut [u8], scale: Scale) -> Edits {
    let source = pattern(1 << 20);
    let mut edits = Edits::default();
    let mut put = |at: usize, bytes: &[u8]| {
        edits.push(at as u64, bytes);
        expected[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &source[..300_000]);
    for n in 0..scale.pick(2000, 20) {
        let at = (n * 7_919) % 900_000;
        let from = n * 13;
        put(at, &source[from..from + 1 + n % 97]);
    }
    put(5, b"last");
    put(5, b"very");
    edits
}

fn later_edits_win(backend: &dyn Backend, scale: Scale) -> Result<(), GdsError> {
    let region = backend.allocate(1 << 20)?;
    let mut expected = vec![0; region.bytes() as usize];
    let edits = scattered_edits(&mut expected, scale);
    backend.write(&region, &edits)?;
    assert_same(&contents(backend, &region)?, &expected);
    Ok(())
}

fn edits_outside_are_refused_before_anything_is_written(
    backend: &dyn Backend,
    _: Scale,
) -> Result<(), GdsError> {
    let region = backend.allocate(8192)?;
    for wrong in [region.bytes(), region.bytes() - 3, u64::MAX - 10] {
        let mut edits = Edits::default();
        edits.push(0, b"good");
        edits.push(wrong, b"beyond");
        refused(backend.write(&region, &edits), out_of_range)?;
    }
    assert!(contents(backend, &region)?.iter().all(|byte| *byte == 0));
    Ok(())
}

fn the_same_edits_leave_the_same_bytes_in_two_regions(
    backend: &dyn Backend,
    scale: Scale,
) -> Result<(), GdsError> {
    let regions = [backend.allocate(1 << 20)?, backend.allocate(1 << 20)?];
    let mut expected = vec![0; regions[0].bytes() as usize];
    let edits = scattered_edits(&mut expected, scale);
    for region in &regions {
        backend.write(region, &edits)?;
    }
    for region in &regions {
        assert_same(&contents(backend, region)?, &expected);
    }
    Ok(())
}

fn what_is_set_is_set_and_nothing_beside_it(
    backend: &dyn Backend,
    scale: Scale,
) -> Result<(), GdsError> {
    let bytes = scale.pick(9 << 20, 9_000);
    let region = backend.allocate(bytes)?;
    let mut expected = vec![0; region.bytes() as usize];
    for (offset, length, value) in [(0, bytes, 3), (5, 1, 4), (1001, bytes - 2002, 5), (7, 0, 6)] {
        backend.set(&region, offset, length, value)?;
        expected[offset as usize..(offset + length) as usize].fill(value);
        assert_same(&contents(backend, &region)?, &expected);
    }
    for (offset, length) in [(region.bytes(), 1), (1, region.bytes()), (u64::MAX, 2)] {
        refused(backend.set(&region, offset, length, 9), out_of_range)?;
    }
    assert_same(&contents(backend, &region)?, &expected);
    Ok(())
}

fn copies_bring_stretches_over(backend: &dyn Backend, scale: Scale) -> Result<(), GdsError> {
    let (from, to) = (backend.allocate(1 << 20)?, backend.allocate(1 << 20)?);
    let mut source = vec![0; from.bytes() as usize];
    backend.write(&from, &scattered_edits(&mut source, scale))?;
    let mut expected = vec![0; to.bytes() as usize];
    let mut pieces = Vec::new();
    for (from_offset, to_offset, bytes) in [(0, 0, 400_000), (3, 500_000, 1), (1000, 500_007, 5000)]
    {
        pieces.push(CopyPiece {
            from_offset: from_offset as u64,
            to_offset: to_offset as u64,
            bytes: bytes as u64,
        });
        expected[to_offset..to_offset + bytes]
            .copy_from_slice(&source[from_offset..from_offset + bytes]);
    }
    backend.copy(&from, &to, &pieces)?;
    assert_same(&contents(backend, &to)?, &expected);
    assert_same(&contents(backend, &from)?, &source);
    // Within one region, apart.
    let within = CopyPiece {
        from_offset: 0,
        to_offset: 600_000,
        bytes: 100_000,
    };
    backend.copy(&from, &from, &[within])?;
    source.copy_within(0..100_000, 600_000);
    assert_same(&contents(backend, &from)?, &source);
    Ok(())
}

fn copies_outside_are_refused_before_anything_is_copied(
    backend: &dyn Backend,
    _: Scale,
) -> Result<(), GdsError> {
    let (from, to) = (backend.allocate(4096)?, backend.allocate(4096)?);
    let mut edits = Edits::default();
    edits.push(0, &[1; 100]);
    backend.write(&from, &edits)?;
    let copy = |from_offset, to_offset, bytes| CopyPiece {
        from_offset,
        to_offset,
        bytes,
    };
    for wrong in [
        copy(from.bytes(), 0, 1),
        copy(0, to.bytes(), 1),
        copy(u64::MAX, 0, 2),
        copy(0, 0, u64::MAX),
    ] {
        refused(
            backend.copy(&from, &to, &[copy(0, 0, 10), wrong]),
            out_of_range,
        )?;
    }
    assert!(contents(backend, &to)?.iter().all(|byte| *byte == 0));
    Ok(())
}

/// Places of 200 rows: of all widths that a column has, on their multiples or not.
const ROW_BUFFERS: [RowBuffer; 5] = [
    RowBuffer {
        offset: 0,
        row_bytes: 1,
    },
    RowBuffer {
        offset: 4096,
        row_bytes: 4,
    },
    RowBuffer {
        offset: 8192,
        row_bytes: 16,
    },
    RowBuffer {
        offset: 20_001,
        row_bytes: 8,
    },
    RowBuffer {
        offset: 32_768,
        row_bytes: 12,
    },
];

fn rows_come_to_the_same_places_and_nothing_else_does(
    backend: &dyn Backend,
    scale: Scale,
) -> Result<(), GdsError> {
    let (from, to) = (backend.allocate(40_960)?, backend.allocate(40_960)?);
    let mut edits = Edits::default();
    let source = pattern(40_960);
    edits.push(0, &source);
    backend.write(&from, &edits)?;
    let rows: Vec<u32> = (0..200).step_by(scale.pick(3, 50)).collect();
    // A driver that just failed may keep a device from it; then nothing is written.
    if backend.copy_rows(&from, &to, &rows, &ROW_BUFFERS)? {
        let mut expected = vec![0; to.bytes() as usize];
        for buffer in ROW_BUFFERS {
            for at in rows.iter().map(|row| buffer.at(*row) as usize) {
                let row = at..at + buffer.row_bytes as usize;
                expected[row.clone()].copy_from_slice(&source[row]);
            }
        }
        assert_same(&contents(backend, &to)?, &expected);
        assert!(backend.copy_rows(&from, &to, &[], &ROW_BUFFERS)?);
        assert!(backend.copy_rows(&from, &to, &rows, &[])?);
        assert_same(&contents(backend, &to)?, &expected);
    }
    assert_same(&contents(backend, &from)?[..source.len()], &source);
    Ok(())
}

fn rows_outside_are_refused_before_anything_is_copied(
    backend: &dyn Backend,
    _: Scale,
) -> Result<(), GdsError> {
    let (small, large) = (backend.allocate(4096)?, backend.allocate(8 << 20)?);
    let mut edits = Edits::default();
    edits.push(0, &[1; 100]);
    backend.write(&small, &edits)?;
    backend.write(&large, &edits)?;
    let beyond = RowBuffer {
        offset: small.bytes() - 8,
        row_bytes: 4,
    };
    let most = RowBuffer {
        offset: u64::MAX - 1,
        row_bytes: u64::MAX,
    };
    for (from, to) in [(&small, &large), (&large, &small)] {
        for (rows, buffer) in [(&[0, 2], beyond), (&[0, 1], most)] {
            let buffers = [ROW_BUFFERS[0], buffer];
            refused(backend.copy_rows(from, to, rows, &buffers), out_of_range)?;
        }
    }
    Ok(())
}

fn reading_outside_is_refused(backend: &dyn Backend, _: Scale) -> Result<(), GdsError> {
    let region = backend.allocate(4096)?;
    let mut out = [9; 8];
    for offset in [region.bytes() - 7, region.bytes() + 1, u64::MAX] {
        refused(backend.read(&region, offset, &mut out), out_of_range)?;
    }
    assert_eq!(out, [9; 8]);
    Ok(())
}

fn nothing_to_do_is_done(backend: &dyn Backend, _: Scale) -> Result<(), GdsError> {
    let file = TestFile::new(10);
    let region = backend.allocate(4096)?;
    assert_eq!(backend.load(&file.file, &[], &region)?.bytes, 0);
    let empty = piece(5, region.bytes(), 0);
    assert_eq!(backend.load(&file.file, &[empty], &region)?.bytes, 0);
    backend.write(&region, &Edits::default())?;
    backend.copy(&region, &region, &[])?;
    backend.read(&region, region.bytes(), &mut [])
}

/// Memory of nobody's.
#[derive(Debug)]
struct Foreign;

impl RegionMemory for Foreign {
    fn export(&self) -> Result<OwnedFd, GdsError> {
        panic!("nobody exports what is not theirs")
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn regions_of_others_are_refused(backend: &dyn Backend, _: Scale) -> Result<(), GdsError> {
    let file = TestFile::new(4096);
    let theirs = Region::new(Arc::new(Foreign), 4096);
    let ours = backend.allocate(4096)?;
    let foreign = |error: &GdsError| matches!(error, GdsError::ForeignRegion { .. });
    let mut edits = Edits::default();
    edits.push(0, b"x");
    refused(
        backend.load(&file.file, &[piece(0, 0, 1)], &theirs),
        foreign,
    )?;
    refused(backend.write(&theirs, &edits), foreign)?;
    refused(backend.set(&theirs, 0, 1, 1), foreign)?;
    refused(backend.copy(&theirs, &ours, &[]), foreign)?;
    refused(backend.copy(&ours, &theirs, &[]), foreign)?;
    refused(backend.copy_rows(&theirs, &ours, &[], &[]), foreign)?;
    refused(backend.copy_rows(&ours, &theirs, &[], &[]), foreign)?;
    refused(backend.read(&theirs, 0, &mut [0]), foreign)
}

fn an_exported_descriptor_is_its_own(backend: &dyn Backend, _: Scale) -> Result<(), GdsError> {
    let region = backend.allocate(4096)?;
    let exported = [region.export()?, region.export()?];
    drop(region);
    for descriptor in &exported {
        let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
    Ok(())
}

fn memory_comes_back_when_the_last_clone_goes(
    backend: &dyn Backend,
    scale: Scale,
) -> Result<(), GdsError> {
    let bytes = scale.pick(64 << 20, 4 << 20);
    let before = backend.memory()?;
    assert!(before.free_bytes <= before.total_bytes);
    let used_before = used_bytes(backend)?;
    let region = backend.allocate(bytes)?;
    let clone = region.clone();
    drop(region);
    assert_eq!(used_bytes(backend)?, used_before + bytes);
    drop(clone);
    assert_eq!(used_bytes(backend)?, used_before);
    Ok(())
}

/// Bytes of the device in use. The host's free memory is everybody's, and pages that were freed
/// do not show in it at once: there, the bytes of regions that are mapped.
fn used_bytes(backend: &dyn Backend) -> Result<u64, GdsError> {
    if backend.device().kind != DeviceKind::Host {
        let memory = backend.memory()?;
        return Ok(memory.total_bytes - memory.free_bytes);
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let regions = maps.lines().filter(|line| line.contains("pinion-region"));
    let bytes = regions.map(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let (end, _) = rest.split_once(' ').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        address(end) - address(start)
    });
    Ok(bytes.sum())
}

fn too_much_memory_is_refused(backend: &dyn Backend, _: Scale) -> Result<(), GdsError> {
    let total_bytes = backend.memory()?.total_bytes;
    for bytes in [total_bytes + 1, u64::MAX, u64::MAX - 4095, 1 << 62] {
        refused(backend.allocate(bytes), |error| {
            matches!(error, GdsError::OutOfMemory { .. })
        })?;
    }
    Ok(())
}

fn regions_are_filled_side_by_side(backend: &dyn Backend, scale: Scale) -> Result<(), GdsError> {
    let file = TestFile::new(scale.pick(3 << 20, 100_000));
    let bytes = file.bytes.len() as u64;
    let load = || -> Result<Vec<u8>, GdsError> {
        let region = backend.allocate(bytes)?;
        backend.load(&file.file, &[piece(0, 0, bytes)], &region)?;
        let copied = backend.allocate(bytes)?;
        let whole = CopyPiece {
            from_offset: 0,
            to_offset: 0,
            bytes,
        };
        backend.copy(&region, &copied, &[whole])?;
        contents(backend, &copied)
    };
    let found: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..scale.pick(4, 2)).map(|_| scope.spawn(load)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for found in found {
        assert_same(&found?[..bytes as usize], &file.bytes);
    }
    Ok(())
}

fn load_write_copy_and_read_follow_each_other_without_a_pause(
    backend: &dyn Backend,
    scale: Scale,
) -> Result<(), GdsError> {
    let file = TestFile::new(scale.pick(1 << 20, 70_000));
    let bytes = file.bytes.len() as u64;
    let (a, b) = (backend.allocate(bytes)?, backend.allocate(bytes)?);
    let whole = CopyPiece {
        from_offset: 0,
        to_offset: 0,
        bytes,
    };
    for round in 0..scale.pick(5_u8, 2) {
        backend.load(&file.file, &[piece(0, 0, bytes)], &a)?;
        let mut expected = file.bytes.clone();
        let mut edits = Edits::default();
        for at in (0..expected.len()).step_by(10_003) {
            edits.push(at as u64, &[round; 9]);
            let end = expected.len().min(at + 9);
            expected[at..end].fill(round);
        }
        backend.write(&a, &edits)?;
        backend.copy(&a, &b, &[whole])?;
        assert_same(&contents(backend, &b)?[..expected.len()], &expected);
    }
    Ok(())
}
