//! The guest program of the commands that change an image in place: `instar snapshot`, `bitmap` and `amend`.
#![no_std]
#![no_main]

use instar_guest::ops::serve_edit;

instar_guest::program!(serve_edit);
