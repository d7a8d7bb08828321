//! Gives the library the driver's SONAME: once it has been opened by its path, glibc answers a
//! later `dlopen("libcuda.so.1")` of the same process with it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
}
