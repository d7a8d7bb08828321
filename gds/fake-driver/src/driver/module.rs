//! Modules and kernels. An image is PTX text; of it only the version, the target and the names of
//! the entries are read. What a kernel of that name does stands in `kernels`.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use crate::abi::{put, text};
use crate::codes::{
    INVALID_HANDLE, INVALID_IMAGE, INVALID_PTX, INVALID_VALUE, NOT_FOUND, UNSUPPORTED_PTX_VERSION,
};
use crate::gate::{Here, giving_back, in_context};
use crate::kernels::{KERNELS, Launch, Params};
use crate::settings;
use crate::space::{Access, Touch};
use crate::state::{self, Function, Module};
use crate::streams::{self, Work};
use crate::violations::violation;

fn load(out: Option<&mut u64>, image: *const c_char, here: Here) -> Result<(), i32> {
    let out = out.ok_or(INVALID_VALUE)?;
    let ptx = text(image).ok_or(INVALID_IMAGE)?;
    let entries = entries(ptx)?;
    let id = state::new_handle();
    state::lock().modules.insert(
        id,
        Module {
            context: here.context,
            entries,
        },
    );
    *out = id;
    Ok(())
}

/// Names of the entries of a PTX text.
fn entries(ptx: &str) -> Result<Vec<String>, i32> {
    let code = ptx
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let words: Vec<&str> = code
        .flat_map(|line| line.split([' ', '\t', '(', ';', ',']))
        .filter(|word| !word.is_empty())
        .collect();
    let after = |name: &str| {
        words
            .iter()
            .position(|word| *word == name)
            .and_then(|at| words.get(at + 1))
    };
    let version = after(".version").ok_or(INVALID_IMAGE)?;
    after(".target")
        .filter(|target| target.starts_with("sm_"))
        .ok_or(INVALID_PTX)?;
    let (major, minor) = version.split_once('.').ok_or(INVALID_PTX)?;
    let number = |text: &str| text.parse::<i32>().map_err(|_| INVALID_PTX);
    if (number(major)?, number(minor)?) > newest_ptx(settings::from_environment().driver_version) {
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    let names = words
        .windows(2)
        .filter(|pair| pair[0] == ".entry")
        .map(|pair| pair[1].to_owned());
    Ok(names.collect())
}

/// CUDA 13.n reads PTX 9.n and CUDA 12.n reads PTX 8.n, but from 12.6 on the numbers are one
/// behind.
fn newest_ptx(driver_version: i32) -> (i32, i32) {
    let (major, minor) = (driver_version / 1000, driver_version % 1000 / 10);
    let behind = i32::from(major == 12 && minor > 5);
    (major - 4, minor - behind)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(out: Option<&mut u64>, image: *const c_char) -> i32 {
    in_context("cuModuleLoadData", |here| load(out, image, here))
}

/// The options are not looked at.
#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadDataEx(
    out: Option<&mut u64>,
    image: *const c_char,
    _count: u32,
    _options: *const i32,
    _values: *const *const c_void,
) -> i32 {
    in_context("cuModuleLoadDataEx", |here| load(out, image, here))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: u64) -> i32 {
    giving_back("cuModuleUnload", |_| {
        let mut state = state::lock();
        if state.modules.remove(&module).is_none() {
            violation(format!(
                "cuModuleUnload of a module that does not exist: {module:#x}"
            ));
            return Err(INVALID_HANDLE);
        }
        state
            .functions
            .retain(|_, function| function.module != module);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(
    out: Option<&mut u64>,
    module: u64,
    name: *const c_char,
) -> i32 {
    in_context("cuModuleGetFunction", |_| {
        let name = text(name).ok_or(INVALID_VALUE)?;
        let mut state = state::lock();
        let found = state.modules.get(&module).ok_or(INVALID_HANDLE)?;
        if !found.entries.iter().any(|entry| entry == name) {
            return Err(NOT_FOUND);
        }
        let Some(kernel) = KERNELS.iter().position(|kernel| kernel.name == name) else {
            eprintln!("fake driver: no kernel is known by the name {name}");
            return Err(NOT_FOUND);
        };
        let id = state::new_handle();
        state.functions.insert(id, Function { module, kernel });
        put(out, id)
    })
}

/// What a launch is made of, apart from its parameters.
#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    _shared_bytes: u32,
    stream: u64,
    params: *const *const c_void,
    extra: *const *const c_void,
) -> i32 {
    in_context("cuLaunchKernel", |here| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads = block
            .iter()
            .try_fold(1u32, |all, side| all.checked_mul(*side));
        if grid.contains(&0)
            || threads.is_none_or(|threads| threads == 0 || threads > 1024)
            || !extra.is_null()
        {
            return Err(INVALID_VALUE);
        }
        let kernel = kernel_of(function)?;
        let params = Arc::new(Params::take(params, KERNELS[kernel].params)?);
        launch(here, stream, kernel, params, grid, block)
    })
}

fn kernel_of(function: u64) -> Result<usize, i32> {
    let state = state::lock();
    let found = state.functions.get(&function).map(|found| found.kernel);
    if found.is_none() {
        violation(format!(
            "cuLaunchKernel of a function whose module is gone: {function:#x}"
        ));
    }
    found.ok_or(INVALID_HANDLE)
}

/// The ranges a kernel declares are resolved now, so that taking one away while it is queued is
/// found out; what it reaches beyond them is looked up while it runs.
fn launch(
    here: Here,
    stream: u64,
    kernel: usize,
    params: Arc<Params>,
    grid: [u32; 3],
    block: [u32; 3],
) -> Result<(), i32> {
    let kernel = &KERNELS[kernel];
    let mut state = state::lock();
    let stream = streams::find(&mut state, kernel.name, here, stream)?;
    let (mut touches, mut known) = (Vec::new(), Vec::new());
    for need in (kernel.needs)(&params)
        .into_iter()
        .filter(|need| need.bytes > 0)
    {
        let access = if need.write {
            Access::ReadWrite
        } else {
            Access::Read
        };
        let range = need.address..need.address.saturating_add(need.bytes);
        // A kernel with a bad pointer faults when it runs: the launch itself succeeds.
        if let Ok(segments) = state.space.resolve(kernel.name, range, here.device, access) {
            let touched = Touch::of(&segments, need.write);
            touches.extend(if need.whole {
                touched
            } else {
                Touch::loosely(touched)
            });
            known.push((segments, access));
        }
    }
    let mut launch = Launch::new(kernel.name, params, grid, block, here.device, known);
    let work = Work::Run(Box::new(move || (kernel.run)(&mut launch)));
    streams::submit(&mut state, stream, kernel.name, touches, work);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_a_ptx_text_are_found_and_newer_versions_refused() {
        let ptx = "// .entry no\n.version 8.4\n.target sm_75\n.address_size 64\n.visible .entry one(\n .param .u64 a)\n{ ret; }\n.entry two()";
        assert_eq!(entries(ptx), Ok(vec!["one".to_owned(), "two".to_owned()]));
        assert_eq!(
            entries(&ptx.replace("8.4", "9.5")),
            Err(UNSUPPORTED_PTX_VERSION)
        );
        assert_eq!(entries("\u{7f}ELF"), Err(INVALID_IMAGE));
        assert_eq!(entries(".version 8.4\n.entry one()"), Err(INVALID_PTX));
    }
}
