//! The C library's allocation functions, over the global allocator: zlib-rs calls them where there is no `std`.

use alloc::alloc::{alloc, dealloc};
use core::alloc::Layout;
use core::ptr;

/// In front of each block: its layout, which `free` is not told.
#[derive(Clone, Copy)]
#[repr(C)]
struct Header {
    size: usize,
    align: usize,
}

const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;

/// Allocates `size` bytes at a multiple of `align`.
///
/// # Safety
/// As in C: `place` takes a pointer.
#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(place: *mut *mut u8, align: usize, size: usize) -> i32 {
    if !align.is_power_of_two() || align < size_of::<usize>() {
        return EINVAL;
    }
    let block = allocate(size, align);
    if block.is_null() {
        return ENOMEM;
    }
    // SAFETY: the caller's promise.
    unsafe { place.write(block) };
    0
}

/// Allocates `count` times `size` zero bytes.
#[unsafe(no_mangle)]
extern "C" fn calloc(count: usize, size: usize) -> *mut u8 {
    let Some(size) = count.checked_mul(size) else { return ptr::null_mut() };
    let block = allocate(size, align_of::<Header>());
    if !block.is_null() {
        // SAFETY: the block has this size.
        unsafe { block.write_bytes(0, size) };
    }
    block
}

/// Gives a block back.
///
/// # Safety
/// As in C: `block` is null, or comes from one of the functions above and was not given back.
#[unsafe(no_mangle)]
unsafe extern "C" fn free(block: *mut u8) {
    if block.is_null() {
        return;
    }
    // SAFETY: `allocate` has put the header there, and the allocation begins one unit of alignment before the block.
    unsafe {
        let header = block.sub(size_of::<Header>()).cast::<Header>().read();
        let layout = Layout::from_size_align_unchecked(header.size, header.align);
        dealloc(block.sub(front(header.align)), layout);
    }
}

/// Bytes in front of a block: room for the header that keeps the alignment.
fn front(align: usize) -> usize {
    align.max(size_of::<Header>())
}

fn allocate(size: usize, align: usize) -> *mut u8 {
    let align = align.max(align_of::<Header>());
    let front = front(align);
    let layout = size.checked_add(front).and_then(|size| Layout::from_size_align(size, align).ok());
    let Some(layout) = layout else { return ptr::null_mut() };
    // SAFETY: the size is not 0: it includes the front, into whose end the header fits; both are aligned for it.
    unsafe {
        let start = alloc(layout);
        if start.is_null() {
            return start;
        }
        let block = start.add(front);
        block.sub(size_of::<Header>()).cast::<Header>().write(Header { size: layout.size(), align });
        block
    }
}
