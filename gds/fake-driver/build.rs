//! Gives the library the driver's SONAME: once it has been opened by its path, glibc answers a
//! later `dlopen("libcuda.so.1")` of the same process with it. And keeps it loaded when it is
//! closed, since the threads of its streams live on.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
