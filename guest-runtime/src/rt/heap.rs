//! The allocator: talc over the heap region, behind a spin lock.
//!
//! The region is claimed in steps, since memory that was never touched costs the host nothing and an allocator marks the
//! end of its heap.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use talc::DefaultBinning;
use talc::base::Talc;
use talc::base::binning::Binning;
use talc::source::Source;

use crate::lock::Lock;

/// The heap grows to multiples of this (a large page of the monitor), from its small beginning below one.
const STEP: usize = 2 << 20;
/// What an allocation may need beyond its size and alignment.
const OVERHEAD: usize = 256;
/// Allocations from this size on begin on a page: the host copies much more slowly to places that lie askew to those they come from.
const LARGE: usize = 64 << 10;
/// Bytes of a page.
const PAGE: usize = 4096;
/// Above this, moving an allocation happens without the lock.
const LOCKED_COPY: usize = 16 << 10;

#[global_allocator]
static HEAP: Heap = Heap(Lock::new(Talc::new(Region { next: 0, end: 0, heap_end: None })));

struct Heap(Lock<Talc<Region, DefaultBinning>>);

/// The heap region, as far as it is not claimed.
#[derive(Debug)]
struct Region {
    next: usize,
    end: usize,
    heap_end: Option<NonNull<u8>>,
}

// SAFETY: the pointer is only used by the allocator that owns this.
unsafe impl Send for Region {}

// SAFETY: `acquire` uses nothing but the allocator it is given, and claims each byte of the region once.
unsafe impl Source for Region {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let Region { next, end, heap_end } = talc.source;
        let needed = layout.size().checked_add(layout.align() + OVERHEAD).ok_or(())?;
        if next == end || needed > end - next + STEP {
            return Err(());
        }
        let stop = next.checked_add(needed).and_then(|stop| stop.checked_next_multiple_of(STEP)).ok_or(())?.min(end);
        let step = stop - next;
        let stop = ptr::with_exposed_provenance_mut::<u8>(stop);
        let new_end = match heap_end {
            // SAFETY: the region up to `end` is this allocator's alone (`init`), and `heap_end` is its heap's present end.
            Some(heap_end) => Some(unsafe { talc.extend(heap_end, stop) }),
            // SAFETY: as above.
            None => unsafe { talc.claim(ptr::with_exposed_provenance_mut(next), step) },
        };
        talc.source.next = next + step;
        talc.source.heap_end = new_end;
        new_end.map(|_| ()).ok_or(())
    }
}

/// What is allocated for `layout`: a large one begins on a page.
fn placed(layout: Layout) -> Layout {
    match layout.size() {
        LARGE.. => layout.align_to(PAGE).unwrap_or(layout),
        _ => layout,
    }
}

/// Hands the heap region to the allocator.
///
/// # Safety
/// The region is mapped, zero, and nobody else's.
pub unsafe fn init((addr, len): (u64, u64)) {
    let end = addr.checked_add(len).expect("heap region wraps");
    HEAP.0.lock().source = Region { next: addr as usize, end: end as usize, heap_end: None };
}

// SAFETY: talc's contract is that of `GlobalAlloc`, and the lock admits one caller at a time.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise: the size is not 0.
        unsafe { self.0.lock().allocate(placed(layout)) }.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise: `ptr` was allocated here with this layout.
        unsafe { self.0.lock().deallocate(ptr, placed(layout)) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: `ptr` was allocated here with `layout`, `new_size` is not 0 and valid for the
        // alignment. No more is copied than either place has.
        unsafe {
            let mut talc = self.0.lock();
            let new_layout = Layout::from_size_align_unchecked(new_size, layout.align());
            let stays = placed(layout).align() == placed(new_layout).align();
            if stays && talc.try_realloc_in_place(ptr, placed(layout), new_size) {
                return ptr;
            }
            let Some(new) = talc.allocate(placed(new_layout)) else { return ptr::null_mut() };
            let kept = layout.size().min(new_size);
            if kept > LOCKED_COPY {
                drop(talc);
                new.as_ptr().copy_from_nonoverlapping(ptr, kept);
                talc = self.0.lock();
            } else {
                new.as_ptr().copy_from_nonoverlapping(ptr, kept);
            }
            talc.deallocate(ptr, placed(layout));
            new.as_ptr()
        }
    }
}
