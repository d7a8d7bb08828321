//! What cannot be written: each file in `misuse/` is a way to lose bytes under a running copy
//! that a compiler must refuse. What the same mistakes do where they can be written is shown by
//! `copy_lifetimes`.

#[test]
fn mistakes_with_running_copies_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/misuse/*.rs");
}
